"""What goes to an engine is what training multiplied: iterated, written, read by somebody else."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_fp import FP8Precision, convert
from lightning_fp.cli import main
from lightning_fp.layers import linear_format
from lightning_fp.layers.linear import is_switchable_linear
from lightning_fp.loop import PrecisionLoop
from lightning_fp.rl import export_model, quantised_state_dict
from lightning_fp.rl.engine.checkpoints import find_checkpoint, weights_in
from lightning_fp.rl.engine.export import export_weights
from lightning_fp.rl.engine.safetensors_files import Part, write_safetensors
from lightning_fp.rl.engine.weight_casts import weight_cast
from lightning_fp.rl.engine.weights import weights_of
from tests.helper import LanguageModel, fit
from tests.rl.engine.reader import dequantised, read_directory

HF, COMPRESSED = "hf-fp8-block", "compressed-tensors-fp8"


class Net(nn.Module):
    """Layers of every kind; no size is a multiple of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 208)
        self.up = nn.Linear(208, 304)
        self.down = nn.Linear(304, 208, bias=False)
        self.head = nn.Linear(208, 20)
        self.norm = nn.LayerNorm(208)
        self.register_buffer("count", torch.tensor(3))


def net(format: str = "fp8-block", **layers: str) -> Net:
    torch.manual_seed(0)
    model = Net()
    convert(model, format, layers={"head": "bf16", **layers})
    return model


def values_of(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """float32, from the iterator."""
    values: dict[str, Tensor] = {}
    for name, tensor, scale in quantised_state_dict(model, **options):
        value = tensor.float()
        if scale is not None:
            assert tensor.dtype == torch.float8_e4m3fn
            if scale.dim() == 2 and scale.shape != (len(value), 1):
                scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                scale = scale[: value.shape[0], : value.shape[1]]
            value = value * scale
        values[name] = value
    return values


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


class TestIterator:
    def test_names_and_dtypes(self) -> None:
        model = net()
        found = {name: (t.dtype, s is None) for name, t, s in quantised_state_dict(model)}
        assert list(found) == list(model.state_dict())
        low = {name for name, (_, high) in found.items() if not high}
        assert low == {"up.weight", "down.weight"}
        assert found["count"] == (torch.int64, True)
        assert {found[name][0] for name in ("embedding.weight", "up.bias", "norm.weight")} == {
            torch.bfloat16
        }

    @pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-rowwise", "fp8-block"])
    def test_values(self, format: str) -> None:
        model = net(format)
        values = values_of(model)
        for name, layer in (("up", model.up), ("down", model.down)):
            expected = weight_cast(layer.weight, linear_format(format)).dequantised()
            assert torch.equal(values[f"{name}.weight"], expected)
        assert torch.equal(values["head.weight"], model.head.weight.bfloat16().float())

    def test_of_delayed_scaling_after_steps(self) -> None:
        """The scale is the one of the next step, which no amax of now gives."""
        module = fit(FP8Precision("delayed"), LanguageModel(), max_steps=3)
        layer = next(m for m in module.modules() if is_switchable_linear(m))
        assert layer.memory is not None
        with torch.no_grad():
            layer.weight.mul_(0.5)
        found = {name: scale for name, _, scale in quantised_state_dict(module)}
        scale = found[f"{layer.fqn}.weight"]
        assert scale is not None
        assert layer.memory.scales is not None
        assert scale == layer.memory.scales[1].reciprocal()

    def test_of_stored_weights(self) -> None:
        torch.manual_seed(0)
        frozen = Net().requires_grad_(False)
        convert(frozen, "fp8-dynamic", layers={"head": "bf16"}, frozen="stored")
        ours, theirs = values_of(frozen), values_of(net("fp8-dynamic"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_of_compiled_models(self) -> None:
        model = net()
        model.up = torch.compile(model.up)  # pyright: ignore[reportAttributeAccessIssue]
        assert set(values_of(model)) == set(net().state_dict())

    def test_names_in_wrappers(self) -> None:
        plain = net()
        averaged = AveragedModel(plain)
        averaged.module.load_state_dict(plain.state_dict())
        values = values_of(averaged)
        assert set(values) == {*plain.state_dict(), "n_averaged"}
        expected = values_of(plain)
        assert all(torch.equal(values[name], expected[name]) for name in expected)

    def test_a_module_in_two_places(self) -> None:
        inner = nn.Linear(64, 64)
        model = nn.ModuleDict({"a": inner, "b": inner, "c": nn.Linear(64, 64)})
        convert(model, "fp8-block")
        dtypes = {name: tensor.dtype for name, tensor, _ in quantised_state_dict(model)}
        assert dtypes["a.weight"] == dtypes["b.weight"] == torch.float8_e4m3fn

    def test_all_in_high_precision_for_now(self, tmp_path: Path) -> None:
        """A weight sync goes on where a recipe or the fallback has no layer in FP8."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64))
        table = convert(model, "fp8-block").precision_map
        table.set("*", "bf16", reason="a stage")
        table.apply()
        synced = {name: (tensor, scale) for name, tensor, scale in quantised_state_dict(model)}
        tensor, scale = synced["0.weight"]
        assert scale is None
        assert torch.equal(tensor, model[0].weight.bfloat16())
        with pytest.raises(ValueError, match="got one with all of them in high precision"):
            export_model(model, tmp_path, HF)

    def test_what_is_due_with_the_coming_step(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop = PrecisionLoop(model, optimizer, "delayed", fallback=False, monitor=False)
        loop.step(lambda x: model(x).square().mean(), torch.randn(4, 64))
        loop.precision_map.set("0", "bf16", reason="a stage")
        with loop.as_trained():
            scales = {name: scale for name, _, scale in quantised_state_dict(model)}
        assert scales["0.weight"] is None
        assert scales["1.weight"] is not None

    def test_weights_under_other_names(self) -> None:
        model = net()

        def rename(module: Any, state: dict[str, Any], prefix: str, meta: Any) -> None:
            state["renamed"] = state.pop("up.weight")

        model.register_state_dict_post_hook(rename)
        with pytest.raises(ValueError, match="all layers in FP8, got none of up; undo"):
            quantised_state_dict(model)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="model must have layers in FP8, got one without"):
            quantised_state_dict(Net())
        with pytest.raises(ValueError, match=r"layer 'up' must be in a format .* got 'mxfp8': its"):
            quantised_state_dict(net("mxfp8"))
        again = values_of(net("mxfp8"), requantise=True)
        blocks = net("fp8-block[quantise_like=bf16-export]")
        assert all(torch.equal(again[name], value) for name, value in values_of(blocks).items())


class TestFiles:
    @pytest.mark.parametrize(
        ("format", "scaling"),
        [
            (HF, "fp8-block"),
            (HF, "fp8-block[power_of_two=true]"),
            (HF, "fp8-dynamic"),
            (HF, "fp8-delayed"),
            (COMPRESSED, "fp8-block"),
            (COMPRESSED, "fp8-dynamic"),
            (COMPRESSED, "fp8-rowwise"),
        ],
    )
    @pytest.mark.parametrize("shard", [None, 100_000])
    def test_another_reader_finds_what_training_multiplied(
        self, tmp_path: Path, format: Any, scaling: str, shard: int | None
    ) -> None:
        model = net(scaling)
        options = {} if shard is None else {"shard": shard}
        exported = export_weights(weights_of(model), tmp_path, format, **options)
        assert (len(exported.files) > 1) == (shard is not None)
        assert not list(tmp_path.glob("*.partial"))
        found = dequantised(read_directory(tmp_path), config_of(tmp_path))
        expected = values_of(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(found[name], value.numpy()), name
        assert set(exported.fp8) == {"up", "down"}
        assert set(exported.high) == {"embedding", "head"}
        assert exported.requantised == ()

    @pytest.mark.parametrize("format", [HF, COMPRESSED])
    def test_the_library_reads_it(self, tmp_path: Path, format: Any) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model = net("fp8-dynamic")
        export_model(model, tmp_path, format)
        theirs = safetensors.load_file(tmp_path / "model.safetensors")
        for name, tensor, _ in quantised_state_dict(model):
            ours, found = tensor.reshape(-1), theirs[name].reshape(-1)
            assert ours.dtype == found.dtype
            assert torch.equal(found.view(torch.uint8), ours.view(torch.uint8))

    def test_config_of_hf(self, tmp_path: Path) -> None:
        config = {"model_type": "net", "torch_dtype": "float32"}
        export_model(net(), tmp_path, HF, config=config)
        read = json.loads((tmp_path / "config.json").read_text())
        assert read["torch_dtype"] == "bfloat16"
        assert read["model_type"] == "net"
        assert read["quantization_config"] == {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["embedding", "head"],
        }

    def test_experts_are_listed(self, tmp_path: Path) -> None:
        model = net()
        model.experts = nn.Module()
        model.experts.up = nn.Parameter(torch.randn(2, 16, 16))
        model.experts.down = nn.Parameter(torch.randn(2, 16, 16))
        exported = export_model(model, tmp_path, HF)
        assert exported.high == ("embedding", "head", "experts")

    def test_config_of_compressed_tensors(self, tmp_path: Path) -> None:
        export_model(net(down="fp8-rowwise", up="fp8-block"), tmp_path, COMPRESSED)
        config = config_of(tmp_path)
        groups = config["config_groups"]
        assert [group["targets"] for group in groups.values()] == [["up"], ["down"]]
        assert [group["weights"]["strategy"] for group in groups.values()] == ["block", "channel"]
        assert groups["group_0"]["weights"]["block_structure"] == [128, 128]
        assert config["ignore"] == ["embedding", "head"]

    def test_what_the_scales_cannot_hold(self, tmp_path: Path) -> None:
        model = net(down="fp8-rowwise")
        with pytest.raises(ValueError, match=r"layer 'down' .* 'hf-fp8-block' can hold, got"):
            export_model(model, tmp_path / "refused", HF)
        assert not (tmp_path / "refused").exists()
        exported = export_model(model, tmp_path / "anew", HF, requantise=True)
        assert exported.requantised == ("down",)
        found = dequantised(read_directory(tmp_path / "anew"), config_of(tmp_path / "anew"))
        anew = linear_format("fp8-block[quantise_like=bf16-export]")
        expected = weight_cast(model.down.weight, anew).dequantised()
        assert np.array_equal(found["down.weight"], expected.detach().numpy())
        assert "cast anew, other than in training: down" in exported.lines()

    def test_other_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="its weights are e5m2, not e4m3"):
            export_model(net("fp8-dynamic[weight=e5m2]"), tmp_path, HF)
        with pytest.raises(ValueError, match="prefix must be what the names of layers in FP8"):
            export_model(net(), tmp_path, HF, prefix="model.")
        with pytest.raises(ValueError, match=r"format must be one of .* did you mean"):
            export_model(net(), tmp_path, "hf-fp8-blok")  # pyright: ignore
        export_model(net(), tmp_path, HF)
        with pytest.raises(ValueError, match="directory must be without safetensors files"):
            export_model(net(), tmp_path, HF)

    def test_a_config_that_is_there_stays(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("theirs")
        with pytest.raises(ValueError, match=r"without safetensors files and config.json, got"):
            export_model(net(), tmp_path, HF)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]

    def test_nothing_is_left_of_a_file_that_failed(self, tmp_path: Path) -> None:
        tensors = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
        part = Part(tensors=tensors, make=lambda: [torch.zeros(2), torch.zeros(2)])
        with pytest.raises(ValueError, match="'b' must be"):
            write_safetensors(tmp_path / "model.safetensors", [part])
        assert not list(tmp_path.iterdir())

    def test_tied_weights(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embedding": nn.Embedding(32, 64), "out": nn.Linear(64, 32)})
        model["out"].weight = model["embedding"].weight  # pyright: ignore
        convert(model, "fp8-block", layers={"out": "fp8-block"})
        with pytest.raises(ValueError, match=r"'out.weight' must not be in FP8 while it is tied"):
            export_model(model, tmp_path, HF)

    def test_names_that_readers_confuse(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"fc": nn.Linear(64, 64)})
        model = nn.ModuleDict({"fc": nn.Linear(64, 64), "a": inner})
        convert(model, "fp8-block", layers={"fc": "bf16"})
        with pytest.raises(ValueError, match=r"layer 'fc' must not be in high .* beside 'a.fc'"):
            export_model(model, tmp_path, HF)
        export_model(model, tmp_path, COMPRESSED)


class TestCheckpoints:
    @pytest.mark.parametrize("scaling", ["delayed", "block"])
    def test_of_a_run(
        self, tmp_path: Path, scaling: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What the checkpoint says is what the model it was made of says."""
        plugin = FP8Precision(scaling, layers={"*head*": "bf16"})
        module = fit(plugin, LanguageModel(), max_steps=3)
        saved = tmp_path / "run" / "checkpoints" / "last.ckpt"
        module.trainer.save_checkpoint(saved)
        (tmp_path / "config.json").write_text('{"model_type": "gpt"}')
        arguments = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
        arguments += ["--config", str(tmp_path / "config.json"), "--prefix", "model."]
        assert main(arguments) == 0
        assert "layers in FP8" in capsys.readouterr().out
        found = dequantised(read_directory(tmp_path / "out"), config_of(tmp_path / "out"))
        expected = values_of(module)
        assert {f"model.{name}" for name in found} == set(expected)
        for name, value in found.items():
            assert np.array_equal(value, expected[f"model.{name}"].numpy()), name

    def test_of_a_module_with_a_compiled_part(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its checkpoint has "_orig_mod" in its names, the table does not."""
        module = fit(FP8Precision("block", layers={"*head*": "bf16"}), LanguageModel(), max_steps=1)
        module.model = torch.compile(module.model)  # pyright: ignore[reportAttributeAccessIssue]
        module.trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert all(name.startswith("model._orig_mod.") for name in module.state_dict())
        weights = weights_in(tmp_path / "last.ckpt")
        exported = export_weights(weights, tmp_path / "out", HF, prefix="model.")
        written = read_directory(tmp_path / "out")
        assert {f"{layer}.weight_scale_inv" for layer in exported.fp8} <= written.keys()
        blocked = tmp_path / "file"
        blocked.write_text("")
        assert main(["export", str(tmp_path / "last.ckpt"), "--output", str(blocked)]) == 2
        assert "--output must be writable" in capsys.readouterr().err

    def test_sharded(self, tmp_path: Path) -> None:
        """As Lightning writes it: torch's distributed checkpoint, and beside it the rest."""
        from torch.distributed.checkpoint import save

        module = fit(FP8Precision("delayed"), LanguageModel(), max_steps=3)
        module.trainer.save_checkpoint(tmp_path / "whole.ckpt")
        state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        sharded = tmp_path / "sharded"
        sharded.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is but one process
            save({"state_dict": state.pop("state_dict")}, checkpoint_id=str(sharded), no_dist=True)
        torch.save(state, sharded / "meta.pt")
        whole, parts = weights_in(tmp_path / "whole.ckpt"), weights_in(sharded)
        for name, weights in (("whole", whole), ("parts", parts)):
            export_weights(weights, tmp_path / name, HF)
        one, other = (read_directory(tmp_path / name) for name in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[n].view(np.uint8), other[n].view(np.uint8)) for n in one)

    def test_the_newest_is_meant(self, tmp_path: Path) -> None:
        for age, name in ((2, "old.ckpt"), (1, "new.ckpt")):
            (tmp_path / name).write_bytes(b"")
            os.utime(tmp_path / name, (1000 - age, 1000 - age))
        assert find_checkpoint(tmp_path).name == "new.ckpt"
        with pytest.raises(ValueError, match="path must be a checkpoint, or a run with one, got"):
            find_checkpoint(tmp_path / "nowhere")

    def test_of_another_run(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
        with pytest.raises(ValueError, match="must be a checkpoint of a run with FP8Precision"):
            weights_in(tmp_path / "plain.ckpt")
        (tmp_path / "no.ckpt").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="must be a checkpoint that loads with weights_only"):
            weights_in(tmp_path / "no.ckpt")


def test_transformers_loads_it(tmp_path: Path) -> None:
    """On a CPU it makes bf16 of the codes and scales; they are what training multiplied."""
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    convert(model, "fp8-block")
    export_model(model, tmp_path, HF, config=model.config.to_dict())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = values_of(model)
    found = loaded.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name].float(), value.bfloat16().float()), name
