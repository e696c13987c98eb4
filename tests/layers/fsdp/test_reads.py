"""A weight that others than its layer read is gathered as it is, and the run says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_fp.layers.fsdp.reads import LooksOn
from tests.layers.fsdp.reads_ranks import BEGINS, HIDDEN, IN, STEPS
from tests.two_ranks import run_on_two_ranks

READ = {
    "penalty": "blocks.0-1.up",
    "tied by hand": "head",
    "after forward": "head",
    "second derivatives": "head, blocks.0-1.up, blocks.0-1.down",
}
MORE = {
    "norm without gradient": "blocks.0-1.up",
    "hook": "blocks.0-1.up",
    "on one rank": "blocks.0-1.up",
    "all parameters after forward": "head",
    "DoRA": "blocks.0-1.up.base_layer",
}
LINEAR = IN * HIDDEN // 2
"""Elements of a rank's shard of `up`, or of `down`."""
NOT_IN_FP8 = {"tied": 2 * 2 * 2 * LINEAR, "parametrized": 2 * 2 * LINEAR + IN * 64 // 2}
"""Bytes that are left out nevertheless: one of each element of the other layers, which are gathered
in forward and in backward but for the head."""
HARMLESS = ["dtype", "dtype after forward"]


def on_ranks(directory: Path, ways: list[str]) -> list[dict[str, Any]]:
    run_on_two_ranks("tests.layers.fsdp.reads_ranks", directory, ways, timeout=500)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ways = [*READ, *NOT_IN_FP8, *HARMLESS, "later"]
    return on_ranks(tmp_path_factory.mktemp("ranks"), ways)


@pytest.mark.parametrize("how", [*READ, *NOT_IN_FP8, *HARMLESS])
def test_losses_are_equal_bit_for_bit_whoever_reads(told: list[dict[str, Any]], how: str) -> None:
    for rank in told:
        assert repr(rank[how]["auto"]["losses"]) == repr(rank[how]["high"]["losses"])


@pytest.mark.parametrize("how", READ)
def test_what_is_read_is_gathered_as_it_is_and_told(told: list[dict[str, Any]], how: str) -> None:
    for rank in told:
        assert_found(rank[how], READ[how])


@pytest.mark.slow
def test_more_that_is_read_is_gathered_as_it_is(tmp_path: Path) -> None:
    """On both ranks, whichever of them reads."""
    pytest.importorskip("peft")
    for rank in on_ranks(tmp_path, list(MORE)):
        for how, layers in MORE.items():
            assert repr(rank[how]["auto"]["losses"]) == repr(rank[how]["high"]["losses"])
            assert_found(rank[how], layers)


def assert_found(run: dict[str, Any], layers: str) -> None:
    """Everything else goes in FP8, from the second step on."""
    (note,) = run["auto"]["notes"]
    assert "FSDP2 gathers weights as they are" in note
    assert layers in note
    assert "until now" not in note
    low, high = run["auto"]["bytes"], run["high"]["bytes"]
    assert low[0] == high[0]
    everything = layers == READ["second derivatives"]
    for one, other in zip(low[1:], high[1:], strict=True):
        assert one == other if everything else 0.5 * other < one < other


@pytest.mark.parametrize("how", HARMLESS)
def test_to_ask_for_a_dtype_is_not_to_read(told: list[dict[str, Any]], how: str) -> None:
    for rank in told:
        assert rank[how]["auto"]["notes"] == []
        low, high = rank[how]["auto"]["bytes"], rank[how]["high"]["bytes"]
        assert all(one <= 0.6 * other for one, other in zip(low[1:], high[1:], strict=True))


@pytest.mark.parametrize("how", NOT_IN_FP8)
def test_a_weight_of_two_modules_or_of_a_parametrization_never_goes_in_fp8(
    told: list[dict[str, Any]], how: str
) -> None:
    for rank in told:
        assert rank[how]["auto"]["notes"] == []
        low, high = rank[how]["auto"]["bytes"], rank[how]["high"]["bytes"]
        saved = [other - one for one, other in zip(low, high, strict=True)]
        assert saved == [0] + [NOT_IN_FP8[how]] * (STEPS - 1)


def test_what_compiles_or_branches_does_so_while_it_is_looked_on() -> None:
    """`torch.cond` is an operator of a higher order, which most modes refuse."""
    counters.clear()
    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda y: y.sin() * 2, backend="eager")
    with LooksOn([]):
        (chosen,) = torch.cond(x.sum() > 0, lambda y: (y * 1,), lambda y: (y * -1,), (x,))
        result = compiled(x)
    assert torch.equal(chosen, x if x.sum() > 0 else -x)
    assert torch.equal(result, x.sin() * 2)
    assert counters["stats"]["unique_graphs"] >= 1


def test_what_begins_to_read_later_is_found_late_and_said(told: list[dict[str, Any]]) -> None:
    """Looked at are the first, second, fourth and eighth forward."""
    for rank in told:
        low, high = rank["later"]["auto"], rank["later"]["high"]
        assert low["losses"][:BEGINS] == high["losses"][:BEGINS]
        (note,) = low["notes"]
        assert "blocks.0-1.up" in note
        assert "until now they may have found FP8's values" in note
        found = BEGINS + 1
        assert low["bytes"][found:] > low["bytes"][1:2] * (STEPS - found)
