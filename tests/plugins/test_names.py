"""precision_plugin: a plugin by name."""

from __future__ import annotations

import re

import pytest

from lightning_fp import FP8Precision, precision_plugin
from tests.helper import fit


@pytest.mark.parametrize(
    ("name", "format", "base"),
    [
        ("fp8-dynamic", "fp8-dynamic", "bf16-mixed"),
        ("rowwise", "fp8-rowwise", "bf16-mixed"),
        ("fp8-rowwise-gw-hp", "fp8-rowwise-gw-hp", "bf16-mixed"),
        ("e8m3", "e8m3", "bf16-mixed"),
        ("bf16", "bf16", "bf16-mixed"),
        ("fp32", "fp32", "32-true"),
    ],
)
def test_names(name: str, format: str, base: str) -> None:
    plugin = precision_plugin(name)
    assert isinstance(plugin, FP8Precision)
    assert plugin.precision == base
    fit(plugin, max_steps=1)
    assert plugin.precision_map.formats()["model.blocks.0.fc1"] == format


def test_options_are_passed_on() -> None:
    plugin = precision_plugin("fp8-dynamic", base="bf16-true", layers={"*.fc1": "bf16"})
    assert plugin.precision == "bf16-true"
    assert precision_plugin("fp32", base="bf16-mixed").precision == "bf16-mixed"
    with pytest.raises(ValueError, match="base must be one of"):
        precision_plugin("fp8-dynamic", base="8-true")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp7-dynamic", "scaling: format must be one of"),
        ("16-mixed", "scaling: format must be one of"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        precision_plugin(name)
