"""Names that are misspelled are answered with the one that was meant, wherever they are taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_fp import (
    FP8Precision,
    FP16Precision,
    Gate,
    LinearFormat,
    RolloutRecipe,
    Stage,
    StagedRollout,
    convert,
    recipes,
)
from lightning_fp.choices import check_at_least, near_names, nearest
from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.numerics import float_format
from tests.helper import TinyGPT

HIGH = {"*": "high"}


def recipe() -> RolloutRecipe:
    return RolloutRecipe(name="a", stages=(Stage(name="only", layers=HIGH),))


@pytest.mark.parametrize(
    ("ask", "meant"),
    [
        (lambda: FP8Precision("delayd"), "delayed"),
        (lambda: FP8Precision("fp8"), "fp8-dynamic"),
        (lambda: FP8Precision("FP8-Rowise"), "fp8-rowwise"),
        (lambda: FP8Precision(layers={"*": "dynamc"}), "dynamic"),
        (lambda: FP8Precision(base="bf16-mixd"), "bf16-mixed"),
        (lambda: FP8Precision(backend="trasformer-engine"), "transformer-engine"),
        (lambda: LinearFormat("dynamic", input="e4m"), "e4m3"),
        (lambda: LinearFormat("dynamic", "tenso"), "tensor"),
        (lambda: StagedRollout("balancd"), "balanced"),
        (lambda: recipes.get("balanced", warmpu=0.1), "warmup"),
        (lambda: recipe().index("onyl"), "only"),
        (lambda: Stage(name="a", layers=HIGH, until={"step": 3}), "steps"),
        (lambda: Stage(name="a", layers=HIGH, on_fail="step-back"), "step_back"),
        (lambda: Gate(statistic="x", below=1.0, reduce="worts"), "worst"),
        (lambda: TrainingInferenceMismatch(aliases="verll"), "verl"),
        (lambda: float_format("bf61"), "bf16"),
    ],
)
def test_what_was_meant(ask: Callable[[], Any], meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"; did you mean {meant!r}?")):
        ask()


def test_layers_that_were_meant() -> None:
    with pytest.raises(ValueError, match=r"Near misses: blocks\.\d\.fc1, blocks\.\d\.fc"):
        convert(TinyGPT(), layers={"blocks.0.fc11": "bf16"})


def test_short_names_are_listed_beside_the_long_ones() -> None:
    short = re.escape("; for short: dynamic, delayed, rowwise, rowwise-gw-hp, block, mx;")
    with pytest.raises(ValueError, match=short):
        FP8Precision("delayd")
    with pytest.raises(ValueError, match="got 'bf17'; for short: bf16, 16, 32; did you mean"):
        FP8Precision(base="bf17")


@pytest.mark.parametrize(
    ("base", "meant"),
    [("bf16", "bf16-mixed"), ("16", "16-mixed"), (16, "16-mixed"), (32, "32-true")],
)
def test_lightnings_aliases_are_taken(base: Any, meant: str) -> None:
    assert FP8Precision(base=base).precision == meant
    if meant == "16-mixed":
        assert FP16Precision(base).precision == meant


def test_te_is_transformer_engine() -> None:
    one, other = (FP8Precision(backend=backend) for backend in ("te", "transformer-engine"))
    assert one.settings() == other.settings()
    with pytest.raises(ValueError, match="backend 'transformer-engine' cannot run 'fp8-rowwise'"):
        convert(TinyGPT(), "rowwise", backend="te")


def test_names_that_begin_alike_come_first_and_case_does_not_matter() -> None:
    known = ("mxfp8", "fp8-dynamic", "fp8-delayed")
    assert near_names("FP8", known, 3) == ["fp8-dynamic", "fp8-delayed", "mxfp8"]
    assert nearest("something", known) is None
    assert nearest("", known) is None


def test_the_first_number_that_is_too_small_is_named() -> None:
    check_at_least(1, steps=1, batches=None)
    with pytest.raises(ValueError, match="batches must be at least 2, got 1"):
        check_at_least(2, steps=2, batches=1, window=0)
