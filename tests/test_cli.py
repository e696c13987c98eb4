"""The command line, called as the entry point calls it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fp.cli import main
from lightning_fp.cli.commands.doctor import FORMATS, support
from lightning_fp.cli.commands.plan import Row, fold, parse_rules
from lightning_fp.cli.loading import load_model
from lightning_fp.kernels.hardware import cuda_has_fp8

MODELS = Path(__file__).parents[1] / "examples" / "models.py"


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(args) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line on stderr of a command that refuses."""
    assert main(args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_module_runs_as_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_fp", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("doctor", "plan", "demo"))


@pytest.mark.parametrize("args", [[], ["nope"], ["plan"], ["demo", "--steps", "many"]])
def test_wrong_usage_exits_with_2(args: list[str]):
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_reports_every_format(capsys: pytest.CaptureFixture[str]):
    found = run_json(capsys, "doctor", "--json")
    status = {row["format"]: row["status"] for row in found["formats"]}
    assert tuple(status) == FORMATS
    assert status["fp32"] == "native"
    assert status["fp8-dynamic"] == ("native" if cuda_has_fp8() else "emulated")
    assert status["e8m3"] == "emulated"
    assert found["software"]["torch"] == torch.__version__
    assert all(row["reason"] for row in found["formats"] if row["status"] == "not")
    cards = {row["names"]: row for row in found["cards"]}
    assert cards["H100, H200, GH200"]["fp8"] == "FP8 tensor cores"


def test_doctor_prints_tables(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "fp8-rowwise-gw-hp" in printed
    assert "in hardware" in printed  # "native" is the name of a kernel, which may be emulated
    assert "C++ compiler" in printed


def test_doctor_gives_the_reason_of_a_format_that_does_not_run():
    answer = support("fp9", "cpu")
    assert answer.status == "not"
    assert answer.reason.startswith("format must be one of")


# --- plan ---------------------------------------------------------------------------------------


def test_plan_of_a_large_model_as_on_fp8_hardware(capsys: pytest.CaptureFixture[str]):
    report = run_json(capsys, "plan", f"{MODELS}:llama_like", "--cuda-fp8", "--json")
    rows = {row["name"]: row for row in report["layers"]}
    assert report["measured"]
    assert 0.7 < report["flops_share"] < 0.9
    assert rows["blocks.0.mlp.up_proj"]["kernel"] == "native"
    assert rows["blocks.0.attention.k_proj"]["reason"] == "too small to gain (4096 -> 1024)"
    assert rows["lm_head"]["format"] == "bf16"


def test_plan_predicts_for_a_card(capsys: pytest.CaptureFixture[str]):
    """Llama-3-8B: what torchao's page gives for eight H100, over bf16 (docs/will-it-pay.md)."""
    command = ["plan", f"{MODELS}:llama_like", "--hardware", "h100", "--tokens", "8192", "--json"]
    shard = ["--devices", "8"]
    rowwise = run_json(capsys, *command, *shard, "--scaling", "fp8-rowwise")
    tensorwise = run_json(capsys, *command, *shard, "--fp8-all-gather")
    assert abs(rowwise["predicted_speedup_end_to_end"] - 1.12) < 0.05
    assert abs(tensorwise["predicted_speedup_end_to_end"] - 1.25) < 0.08
    assert 1.1 < rowwise["predicted_speedup"] < tensorwise["predicted_speedup"] < 2
    rows = {row["name"]: row for row in rowwise["layers"]}
    assert rows["blocks.0.mlp.up_proj"]["predicted_speedup"] > 1.1
    assert rows["blocks.0.mlp.up_proj"]["flops"] == 6 * 8192 * 4096 * 14336
    assert rows["blocks.0.mlp.up_proj"]["bytes"] > rows["blocks.0.mlp.up_proj"]["bytes_bf16"]
    assert rows["blocks.0.attention.k_proj"]["predicted_speedup"] == 1
    assert rowwise["tokens"] == 8192
    assert rowwise["assumptions"]


def test_plan_says_where_fp8_does_not_pay(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", f"{MODELS}:llama_like", "--hardware", "a100"]) == 0
    printed = capsys.readouterr().out
    assert "not worth it for speed: train in bf16 here" in printed
    assert "leave out, faster in bf16: blocks.0-31.attention.q_proj" in printed
    assert "nothing was measured" in printed
    few = run_json(
        capsys, "plan", f"{MODELS}:llama_like", "--hardware", "h100", "--tokens", "256", "--json"
    )
    assert "blocks.0.attention.q_proj" in few["leave_out"]
    assert few["predicted_speedup_end_to_end"] < 1


WITHOUT_EXAMPLE = """
from torch import nn

def stack():
    return nn.Sequential(nn.Linear(4096, 8192), nn.ReLU(), nn.Linear(8192, 4096))

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8192, 8192)

    def forward(self, a, b):
        return self.fc(a + b)
"""


def test_plan_guesses_a_sequence_where_there_is_no_example(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "plain.py").write_text(WITHOUT_EXAMPLE)
    card = ["--hardware", "h100", "--json"]
    stack = run_json(capsys, "plan", f"{tmp_path / 'plain.py'}:stack", *card)
    assert stack["tokens"] == 8192
    assert 1 < stack["predicted_speedup_end_to_end"] < stack["predicted_speedup"]
    odd = run_json(capsys, "plan", f"{tmp_path / 'plain.py'}:Odd", *card)
    assert odd["predicted_speedup"] > 1
    assert odd["predicted_speedup_end_to_end"] is None


def test_plan_follows_rules_in_order(capsys: pytest.CaptureFixture[str]):
    rules = ["--layers", "*.o_proj=e8m3", "--layers", '{"*.attention.*": "fp8-rowwise"}']
    report = run_json(capsys, "plan", f"{MODELS}:mixture_of_experts", *rules, "--json")
    formats = {row["name"]: row["format"] for row in report["layers"]}
    assert formats["blocks.3.attention.o_proj"] == "e8m3"
    assert formats["blocks.3.attention.q_proj"] == "fp8-rowwise"
    assert formats["blocks.3.mlp.router"] == "bf16"


def test_plan_folds_repeated_blocks(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", f"{MODELS}:mixture_of_experts"]) == 0
    folded = capsys.readouterr().out
    assert main(["plan", f"{MODELS}:mixture_of_experts", "--all"]) == 0
    unfolded = capsys.readouterr().out
    assert "blocks.*.mlp.experts.*.up_proj" in folded
    assert "blocks.2.mlp.experts.7.up_proj" in unfolded
    assert "112 of 117 linear layers in low precision" in folded


def test_plan_says_where_hardware_would_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Emulated, every shape and product runs; a plan made on a laptop is for a card."""
    (tmp_path / "odd.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4096, 4096),"
        " nn.Linear(4096, 4112))\n"
    )
    command = ["plan", f"{tmp_path / 'odd.py'}:net"]
    said = ("On FP8 hardware (--cuda-fp8) 1 of 2 layers are otherwise", "4112 is not a multiple")
    for arguments, expected in (
        (["--scaling", "mxfp8"], said),
        (["--scaling", "fp8-dynamic[input=e5m2]"], ("On FP8 hardware it is refused",)),
        (["--cuda-fp8"], ()),
    ):
        assert main([*command, *arguments]) == 0
        printed = capsys.readouterr().out
        assert all(text in printed for text in expected)
        assert bool(expected) == ("On FP8 hardware" in printed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["models"], "factory must be 'package.module:factory'"),
        (["no_such_module:model"], "cannot import no_such_module: ModuleNotFoundError"),
        (["nowhere.py:model"], "there is no file nowhere.py"),
        ([f"{MODELS}:nope"], "has no 'nope'; it has Attention,"),
        ([f"{MODELS}:Block"], "raised TypeError"),
        ([f"{MODELS}:llama_like", "--layers", "blocks"], "--layers must be PATTERN=FORMAT"),
        ([f"{MODELS}:llama_like", "--layers", "a=bf16"], "pattern 'a' matches no linear layer"),
        ([f"{MODELS}:llama_like", "--scaling", "fp9"], "scaling: format must be one of"),
        ([f"{MODELS}:llama_like", "--backend", "cutlass"], "backend must be one of"),
        ([f"{MODELS}:llama_like", "--hardware", "h100", "--tokens", "0"], "--tokens must be 1 or"),
        (
            [f"{MODELS}:llama_like", "--hardware", "h100", "--fp8-all-gather"],
            "--fp8-all-gather must come with --devices 2 or more",
        ),
    ],
)
def test_plan_refuses_in_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert message in refused(capsys, "plan", *args)


def test_parse_rules():
    assert parse_rules(["*head=bf16", '{"a.*": "e8m3"}']) == {"*head": "bf16", "a.*": "e8m3"}
    assert parse_rules(["re:a(?=b)b=fp8-dynamic[grad_output=e4m3]"]) == {
        "re:a(?=b)b": "fp8-dynamic[grad_output=e4m3]"
    }
    with pytest.raises(ValueError, match="pattern 'a' is given twice"):
        parse_rules(["a=bf16", "a=fp32"])


def test_fold_keeps_layers_apart_that_differ():
    def row(name: str, parameters: int = 10, reason: str | None = None) -> Row:
        return Row(
            name=name,
            format="bf16",
            kernel="nn.Linear",
            layers=1,
            parameters=parameters,
            flops_share=0.1,
            reason=reason,
        )

    rows = [row("b.0.fc"), row("b.1.fc"), row("b.2.fc", 20), row("b.3.fc", reason="head")]
    assert [(r.name, r.layers, r.parameters) for r in fold(rows)] == [
        ("b.*.fc", 2, 20),
        ("b.2.fc", 1, 20),
        ("b.3.fc", 1, 10),
    ]


# --- factories ----------------------------------------------------------------------------------

FACTORIES = """
import lightning as L
import torch
from torch import nn

def on_meta():
    return nn.Linear(16, 16)

def needs_values():
    assert torch.ones(2).sum().item() == 2  # impossible on the meta device
    return nn.Linear(16, 16), torch.ones(2, 16)

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 16)
    def configure_model(self):
        self.layer = nn.Linear(16, 16)

def fails_forward():
    return nn.Linear(16, 16), torch.zeros(2, 5)

def text():
    return "a model"

def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "factories_of_a_user.py"
    path.write_text(FACTORIES)
    return str(path)


def test_load_model_builds_on_meta_where_possible(factories: str):
    assert load_model(f"{factories}:on_meta").model.weight.is_meta
    loaded = load_model(f"{factories}:needs_values")
    assert loaded.model.weight.device.type == "cpu"
    assert loaded.example_input.shape == (2, 16)


def test_load_model_knows_lightning_modules(factories: str):
    loaded = load_model(f"{factories}:Module")
    assert loaded.model.layer.in_features == 16
    assert loaded.example_input.shape == (2, 16)


def test_load_model_refuses_what_is_no_model(factories: str):
    with pytest.raises(ValueError, match=r"must return an nn.Module, .* got str"):
        load_model(f"{factories}:text")
    with pytest.raises(ValueError, match=r"raised RuntimeError: no weights \(.*line \d+\)"):
        load_model(f"{factories}:broken")


def test_plan_without_flops_where_the_forward_fails(
    factories: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", f"{factories}:fails_forward", "--layers", "*=fp8-dynamic"]) == 0
    assert "the forward failed: RuntimeError" in capsys.readouterr().out


def test_plan_reads_the_dummy_inputs_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers")
    (tmp_path / "hf.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "def tiny():\n"
        "    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128,"
        " num_hidden_layers=2, num_attention_heads=4, vocab_size=256))\n"
    )
    report = run_json(
        capsys, "plan", f"{tmp_path / 'hf.py'}:tiny", "--layers", "*_proj=e8m3", "--json"
    )
    assert report["measured"]
    assert len(report["layers"]) == 15


# --- demo ---------------------------------------------------------------------------------------


def test_demo_flips_a_layer_and_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--steps", "4", "--batch-size", "2", "--context", "16"]
    assert main(["demo", "--output", str(tmp_path), "--rollout", "false", *small]) == 0
    printed = capsys.readouterr().out
    assert "ended bit for bit as the uninterrupted run" in printed

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["resume_is_exact"]
    assert summary["conversion"]["flops_share"] > 0.9
    assert abs(summary["gap"]) < 0.05
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["fp8_resumed"] == ""
    assert rows[3]["fp8_resumed"] == rows[3]["fp8"]
    assert float(rows[0]["bf16"]) == pytest.approx(5.5, abs=0.3)  # ln 256, before learning

    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert saved["lightning_fp.precision"]["formats"]["blocks.1.mlp.down"] == "bf16"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "3"], "steps must be at least 4, got 3"),
        (["--scaling", "bf16"], "scaling must be a low-precision format, got 'bf16'"),
        (["--scaling", "fp9"], "format must be one of"),
    ],
)
def test_demo_refuses_in_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert message in refused(capsys, "demo", *args)
