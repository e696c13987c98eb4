"""Warnings: which, how often, and with which advice."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import get_args

import pytest
import torch

from lightning_fp.layers import Backend, linear_format
from lightning_fp.layers.backends import could_run
from lightning_fp.records import StatisticsRows
from lightning_fp.telemetry.casts.remedies import Limits, Warnings, remedy

LIMITS = Limits(clamped_mass=0.01, underflow=0.25, nonfinite=1)


def rows(
    *entries: tuple[str, str, dict[str, float]], format: str = "fp8-delayed"
) -> StatisticsRows:
    defaults = {"clamped_mass": 0.0, "underflow_fraction": 0.0, "nonfinite": 0, "sampled_steps": 3}
    defaults |= {"flops": 100.0, "padding_fraction": 0.0}
    values = {
        name: torch.tensor([entry[2].get(name, default) for entry in entries], dtype=torch.float64)
        for name, default in defaults.items()
    }
    return StatisticsRows(
        layers=[entry[0] for entry in entries],
        operands=[entry[1] for entry in entries],
        formats=[linear_format(format)] * len(entries),
        values=values,
    )


class TestWhich:
    def test_at_the_limit_and_above(self) -> None:
        found = Warnings(LIMITS).of(
            rows(
                ("a", "input", {"clamped_mass": 0.0099}),
                ("b", "input", {"clamped_mass": 0.031}),
                ("c", "input", {"underflow_fraction": 0.5}),
                ("d", "input", {"clamped_mass": math.nan}),
            )
        )
        assert found == [
            "layer b: input clamped mass 3.1% over 3 sampled steps under fp8-delayed; raise margin,"
            " or set layers={'b': 'fp8-dynamic'}",
            "layer c: input underflow 50.0% over 3 sampled steps under fp8-delayed; set"
            " layers={'c': 'fp8-delayed[input=e5m2,grad_weight=high]'}, or set"
            " layers={'c': 'fp8-rowwise'}",
        ]

    def test_the_worst_first_and_not_all(self) -> None:
        mass = {f"l{i}": 0.1 + i / 100 for i in range(10)}
        entries = [(layer, "input", {"clamped_mass": value}) for layer, value in mass.items()]
        entries.append(("z", "input", {"nonfinite": 1}))
        found = Warnings(LIMITS).of(rows(*entries))
        layers = [re.findall(r"layer (\w+):", warning) for warning in found]
        assert layers == [["z"], ["l9"], ["l8"], []]
        assert found[-1].startswith("8 more operands are over a limit")

    def test_not_of_the_output_nor_in_high_precision(self) -> None:
        assert not Warnings(LIMITS).of(rows(("a", "output", {"nonfinite": 9})))
        high = rows(("a", "input", {"nonfinite": 9}), format="bf16")
        assert not Warnings(LIMITS).of(high)

    def test_off(self) -> None:
        off = dataclasses.replace(LIMITS, clamped_mass=None)
        assert not Warnings(off).of(rows(("a", "input", {"clamped_mass": 1.0})))


def test_zeros_that_fill_up_blocks_are_told_where_they_cost() -> None:
    """Over all layers: an expert of few tokens is nothing beside the others."""
    warnings = Warnings(LIMITS)
    large = ("a", "input", {"flops": 9e9})
    small = ("expert", "input", {"flops": 1e7, "padding_fraction": 0.75})
    assert not warnings.of(rows(large, small))
    assert not warnings.of(rows(large, ("a", "weight", {"flops": math.nan})))
    half = ("expert", "input", {"flops": 1e9, "padding_fraction": 0.5})
    said = [warnings.of(rows(large, half)) for _ in range(4)]
    assert [len(each) for each in said] == [1, 1, 0, 1]
    assert said[0][0].startswith("9.1% of the FLOPs of the layers in FP8 multiply zeros")
    assert "of layer expert 50.0%" in said[0][0]


def test_ever_more_rarely() -> None:
    warnings = Warnings(LIMITS)
    one, other = (rows((layer, "input", {"clamped_mass": 0.5})) for layer in "ab")
    said = [bool(warnings.of(one)) for _ in range(9)]
    assert [i + 1 for i, it_was in enumerate(said) if it_was] == [1, 2, 4, 8]
    assert warnings.of(other)


@pytest.mark.parametrize(
    ("kind", "operand", "format"),
    [
        ("clamped_mass", "input", "fp8-delayed"),
        ("clamped_mass", "input", "e4m3"),
        ("underflow_fraction", "input", "fp8-dynamic"),
        ("underflow_fraction", "grad_output", "fp8-dynamic"),
        ("underflow_fraction", "grad_output", "fp8-rowwise"),
        ("underflow_fraction", "input", "fp8-delayed[input=e5m2]"),
        ("underflow_fraction", "input", "fp8-rowwise[input=e5m2]"),
        ("underflow_fraction", "weight", "fp8-block"),
        ("underflow_fraction", "weight", "mxfp8"),
        ("nonfinite", "weight", "fp8-delayed"),
    ],
)
def test_every_format_advised_exists_and_is_another_one(
    kind: str, operand: str, format: str
) -> None:
    advice = remedy(kind, "blocks.0", operand, linear_format(format))
    named = re.findall(r"'blocks.0': '([^']+)'", advice)
    assert named
    for name in named:
        assert linear_format(name) != linear_format(format)


@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("kind", ["clamped_mass", "underflow_fraction", "nonfinite"])
@pytest.mark.parametrize("operand", ["input", "weight", "grad_output"])
def test_every_format_advised_could_run_on_fp8_hardware(
    backend: Backend, kind: str, operand: str
) -> None:
    """e5m2 x e5m2 is no product of NVIDIA's, fnuz no format of its, and TE has its recipes only."""
    named = 0
    for base in ("fp8-dynamic", "fp8-delayed", "fp8-rowwise", "fp8-rowwise-gw-hp", "fp8-block"):
        for changes in ("", "[input=e5m2]", "[weight=e5m2]", "[grad_output=e4m3]"):
            advice = remedy(kind, "up", operand, linear_format(base + changes), backend)
            for name in re.findall(r"'up': '([^']+)'", advice):
                named += 1
                assert could_run(linear_format(name), backend), (base + changes, name)
    assert named >= 20
