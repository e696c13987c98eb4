"""What a base precision answers, whichever it is."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch

from lightning_fp import FP8Precision, FP16Precision, LossScaling
from lightning_fp.layers import linear_format
from lightning_fp.plugins.base import LOSS_SCALE, STATE_KEY, LayerPrecision
from lightning_fp.stepping.base_precision import Base, BasePrecision
from lightning_fp.stepping.fp16_base import FP16Base
from lightning_fp.stepping.loss_scaler import LossScaler, NoScaler

FORMATS = {
    "bf16-mixed": ("bf16", "bf16"),
    "bf16-true": ("bf16", "bf16"),
    "32-true": ("fp32", "fp32"),
    "16-mixed": ("fp16", "bf16"),
    "16-true": ("fp16", "bf16"),
}
"""The format of layers left alone, and the one to fall back to."""


def plugin_over(base: Base) -> LayerPrecision:
    return FP16Precision(base) if base == "16-true" else FP8Precision(base=base)


@pytest.mark.parametrize("base", get_args(Base))
def test_what_a_base_is(base: Base) -> None:
    plugin, half = plugin_over(base), base.startswith("16")
    assert (plugin.base_format.name, plugin.high_precision.name) == FORMATS[base]
    assert plugin.falls_back_whole == half
    assert plugin.half_dtype is (torch.float16 if half else None)
    assert (plugin.scaler is not None) == half
    assert (plugin.guard is not None) == half
    assert plugin.start_guarding(skip_nonfinite=False).skip_nonfinite == half
    assert plugin.base.is_low(linear_format("fp8-dynamic"))
    assert plugin.base.is_low(linear_format("fp16")) == half
    assert ("loss_scaling" in plugin.settings()) == half


@pytest.mark.parametrize(("quiet", "acting"), [(BasePrecision, FP16Base), (NoScaler, LossScaler)])
def test_who_does_nothing_can_be_asked_everything(quiet: type[Any], acting: type[Any]) -> None:
    """So that nobody has to ask which of the two it is."""
    for name, does_nothing in inspect.getmembers(quiet, inspect.isfunction):
        does = getattr(acting, name)
        if name != "__init__":
            parameters = inspect.signature(does_nothing).parameters
            assert list(inspect.signature(does).parameters) == list(parameters)


def test_a_loss_scale_goes_through_a_base_that_has_no_use_for_it() -> None:
    saved: dict[str, Any] = {}
    before = FP16Precision(loss_scaling=LossScaling(init_scale=512))
    before.on_save_checkpoint(saved)
    between, passed = FP8Precision(), {}
    between.on_load_checkpoint(saved)
    between.on_save_checkpoint(passed)
    assert passed[STATE_KEY][LOSS_SCALE] == saved[STATE_KEY][LOSS_SCALE]
    assert "MixedPrecision" in saved
    assert "MixedPrecision" not in passed
    after = FP16Precision()
    after.on_load_checkpoint(passed)
    assert after.scaler is not None
    assert after.scaler.state.numbers()["scale"] == 512
