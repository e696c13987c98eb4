"""Rules: what they match, what is refused, and the defaults."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed import HashStore
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_fp import convert, revert
from lightning_fp.layers.regions import compiled_regions
from lightning_fp.layers.rules import clean_name, layer_rules
from tests.helper import TinyGPT


def formats(model: nn.Module, *args: Any, **options: Any) -> dict[str, str]:
    return convert(model, *args, **options).precision_map.formats()


def test_the_first_match_wins() -> None:
    found = formats(
        TinyGPT(),
        layers={
            "blocks.0.fc1": "bf16",
            "blocks.0.*": "fp8-rowwise",
            "re:.*\\.(fc1|fc2)": "fp8-rowwise-gw-hp",
        },
    )
    assert found == {
        "blocks.0.qkv": "fp8-rowwise",
        "blocks.0.proj": "fp8-rowwise",
        "blocks.0.fc1": "bf16",
        "blocks.0.fc2": "fp8-rowwise",
        "blocks.1.qkv": "fp8-dynamic",
        "blocks.1.proj": "fp8-dynamic",
        "blocks.1.fc1": "fp8-rowwise-gw-hp",
        "blocks.1.fc2": "fp8-rowwise-gw-hp",
        "lm_head": "high",
    }


def test_rules_overrule_the_defaults() -> None:
    assert formats(TinyGPT(), layers={"lm_head": "fp8-dynamic"})["lm_head"] == "fp8-dynamic"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["*"], "layers must be a mapping {pattern: format}, got list"),
        ({3: "bf16"}, "layer pattern must be a string, got 3"),
        ({"re:(": "bf16"}, "layer pattern must be a regular expression, got 're:('"),
        ({"*": "bf8"}, "layers['*']: format must be one of"),
    ],
)
def test_malformed_rules_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_rules(layers)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        # a typo, and a pattern that does not cover the whole name
        ("*.fc3", "pattern '*.fc3' matches no linear layer; it must cover the whole name"),
        ("fc1", "pattern 'fc1' matches no linear layer; it must cover the whole name"),
        ("re:fc1", "matches no linear layer"),
        # modules that are no linear layer
        ("blocks.0", "matches only modules that cannot be converted: blocks.0 (a Block, not an"),
        ("blocks.0", "for the layers inside write 'blocks.0.*'"),
        ("*.norm", "matches only modules that cannot be converted: blocks.0.norm (a LayerNorm"),
        ("embed", "embed (an Embedding, not an nn.Linear)"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(pattern: str, message: str) -> None:
    model = TinyGPT()
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(model, layers={pattern: "bf16"})
    assert type(model.lm_head) is nn.Linear, "a refused conversion must change nothing"


@pytest.mark.parametrize("pattern", ["*.fc3", "blocks.1.fc", "fc1"])
def test_near_misses_are_listed(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"Near misses: .*blocks\.[01]\.fc[12]"):
        convert(TinyGPT(), layers={pattern: "bf16"})


def test_a_shadowed_rule_is_refused() -> None:
    message = "rule 'blocks.1.fc1' never applies, earlier rules take the 1 layer it matches"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(TinyGPT(), layers={"blocks.*": "fp8-rowwise", "blocks.1.fc1": "bf16"})


def test_a_subclass_of_linear_is_named() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(16, 16), Scaled(16, 16))
    message = "1 (Scaled, a subclass of nn.Linear with a forward of its own)"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(model, layers={"1": "fp8-dynamic"})
    report = convert(model)
    assert type(model[1]) is Scaled
    assert report.layers[1].reason == message.removeprefix("1 (").removesuffix(")")


class Defaults(nn.Module):
    """One layer for every default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up_proj = nn.Linear(32, 64)
        self.gate_proj = nn.Linear(32, 64)  # of a gated MLP: not a router
        self.odd_in = nn.Linear(30, 64)
        self.odd_out = nn.Linear(32, 50)
        self.router = nn.Linear(32, 16)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(32, 16), "head": nn.Linear(32, 64)})
        self.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
        self.lora_A = nn.Linear(32, 16)
        self.tied = nn.Linear(32, 64, bias=False)
        self.tied.weight = self.embed.weight


def test_defaults_give_their_reason() -> None:
    reasons = {layer.name: layer.reason for layer in convert(Defaults()).layers}
    assert reasons == {
        "up_proj": None,
        "gate_proj": None,
        "odd_in": "in_features=30 is not a multiple of 16",
        "odd_out": "out_features=50 is not a multiple of 16",
        "router": "router or gate",
        "mlp.gate": "router or gate",
        "mlp.head": "output head",
        "classifier.0": "output head",
        "classifier.1": "output head",
        "lora_A": "adapter",
        "tied": "output head: shares its weight with the embedding",
    }


def test_a_rule_converts_odd_dims_under_emulation() -> None:
    model = Defaults()
    assert formats(model, layers={"odd_*": "fp8-dynamic"})["odd_in"] == "fp8-dynamic"
    model.odd_in(torch.randn(3, 30)).sum().backward()
    model.odd_out(torch.randn(3, 32)).sum().backward()
    assert model.odd_in.weight.grad is not None


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_names_are_those_of_the_unwrapped_model(wrapper: str) -> None:
    assert clean_name(f"a.{wrapper}.b") == "a.b"
    assert clean_name(wrapper) == ""
    assert clean_name("a.b") == "a.b"


class Wraps(nn.Module):
    """A user's own module that calls what it has `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def fabric_module(model: nn.Module) -> nn.Module:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    return fabric.setup(torch.compile(model, backend="eager"))  # pyright: ignore


def distributed(model: nn.Module) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        distributed,
        fabric_module,
        checkpoint_wrapper,
        lambda model: nn.DataParallel(torch.compile(nn.DataParallel(model), backend="eager")),
    ],
)
def test_rules_match_the_users_names_under_any_wrapper(wrap: Any) -> None:
    wrapped = wrap(Wraps())
    report = convert(wrapped, layers={"module.1": "bf16"}, example_input=torch.ones(16, 16))
    formats = {"module.0": "fp8-dynamic", "module.1": "bf16"}
    assert report.precision_map.formats() == formats
    assert [row.name for row in report.layers] == list(formats)
    assert [row.flops_share for row in report.layers] == [0.5, 0.5]
    for region in compiled_regions(wrapped, formats):
        assert (region.name, region.layers) == ("", tuple(formats))
    assert revert(wrapped) == 2
    inside = nn.ModuleDict({"generator": wrap(Wraps())})
    assert list(convert(inside).precision_map.formats()) == [f"generator.{n}" for n in formats]
