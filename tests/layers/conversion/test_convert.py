"""convert, decide and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_fp import convert, revert
from lightning_fp.layers import Conversion, linear_format
from lightning_fp.layers.conversion.decide import decide
from lightning_fp.layers.rules import layer_rules
from tests.helper import TinyGPT, next_byte_loss, text_rows


@pytest.mark.parametrize("fmt", ["fp8-dynamic", "fp8-rowwise", "fp8-rowwise-gw-hp", "e8m3"])
def test_a_plain_loop_learns(fmt: str) -> None:
    model, rows = TinyGPT(), text_rows(160).view(20, 8, -1)
    report = convert(model, fmt)
    assert {layer.format for layer in report.converted} == {fmt}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in rows:
        loss = next_byte_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert revert(model) == 9
    model(rows[0][:, :-1])


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match=r"nothing to convert: the model has no nn\.Linear layer"):
        convert(nn.Sequential(nn.Conv1d(3, 3, 3), nn.ReLU()))


def test_nothing_left_to_convert_lists_the_reasons() -> None:
    model = nn.ModuleDict({"head": nn.Linear(32, 32), "odd": nn.Linear(30, 32)})
    message = (
        "nothing to convert: every linear layer was left in high precision (head: output head;"
        " odd: in_features=30 is not a multiple of 16); name the layers to convert with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(model)
    assert type(model["head"]) is nn.Linear


def test_high_precision_on_request_is_not_an_error() -> None:
    assert not convert(TinyGPT(), "bf16").converted
    assert not convert(TinyGPT(), layers={"*": "bf16"}).converted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp9"}, "format must be one of"),
        ({"backend": "cutlass"}, "backend must be one of auto, native, torchao"),
        (
            {"format": "fp8-rowwise", "backend": "native"},
            "backend 'native' cannot run 'fp8-rowwise'",
        ),
        (
            {"backend": "native", "layers": {"*.fc1": "fp8-rowwise"}},
            "backend 'native' cannot run 'fp8-rowwise'",
        ),
    ],
)
def test_bad_options_change_nothing(options: dict[str, object], message: str) -> None:
    model = TinyGPT()
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(model, **options)  # pyright: ignore
    assert type(model.blocks[0].fc1) is nn.Linear


def on_fp8_hardware(model: nn.Module, format: str, layers: dict[str, str] | None = None):
    conversion = Conversion(format=linear_format(format), rules=layer_rules(layers), cuda_fp8=True)
    return decide(model, conversion)


def test_fp8_hardware_refuses_a_rule_for_odd_dims() -> None:
    model = nn.ModuleDict({"up": nn.Linear(8192, 8192), "odd": nn.Linear(8192, 50)})
    with torch.device("meta"):
        message = "layer 'odd': out_features must be a multiple of 16 for the FP8 GEMM, got 50"
        with pytest.raises(ValueError, match=re.escape(message)):
            on_fp8_hardware(model, "fp8-dynamic", {"odd": "fp8-dynamic"})
        assert on_fp8_hardware(model, "fp8-dynamic", {"odd": "e8m3"})["odd"].reason is None


def test_the_size_filter_counts_on_fp8_hardware_only() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"small": nn.Linear(1024, 1024), "large": nn.Linear(8192, 8192)})
    decisions = on_fp8_hardware(model, "fp8-rowwise")
    assert decisions["small"].reason == "too small to gain (1024 -> 1024)"
    assert decisions["large"].reason is None
    explicit = on_fp8_hardware(model, "fp8-rowwise", {"small": "fp8-rowwise"})
    assert explicit["small"].reason is None
    emulated = decide(model, Conversion(format=linear_format("fp8-rowwise")))
    assert emulated["small"].reason is None
    assert on_fp8_hardware(model, "e8m3")["small"].reason is None


def test_the_map_refuses_odd_dims_on_fp8_hardware() -> None:
    model = nn.ModuleDict({"odd": nn.Linear(50, 32), "even": nn.Linear(32, 32)})
    table = convert(model).precision_map
    table.known.cuda_fp8 = True
    message = "layer 'odd' cannot run 'fp8-dynamic': in_features and out_features must be multiples"
    with pytest.raises(ValueError, match=re.escape(message)):
        table.set("odd", "fp8-dynamic")
    table.set("odd", "e8m3")
