"""Signals: read without waiting, and alike on all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_fp.stability.detect.signals import SignalQueue, StepSignals
from tests.stability.detect.signal_ranks import CASES, INF, NAN, put
from tests.two_ranks import run_on_two_ranks


def test_on_the_host_a_step_is_read_at_once() -> None:
    queue = SignalQueue()
    assert queue.take() == []
    for step in range(3):
        put(queue, step, {"loss": [2.5], "norms": [3.0, 4.0], "headroom": [1.0, -0.5]}, "cpu")
        expected = StepSignals(
            step=step, loss=2.5, grad_norm=5.0, lr=1e-3, headroom=-0.5, skipped=False
        )
        assert queue.take() == [expected]
    assert queue.take(all=True) == []


def test_what_there_is_not_is_none() -> None:
    queue = SignalQueue()
    put(queue, 7, {}, "cpu")
    nothing = StepSignals(step=7, loss=None, grad_norm=None, lr=1e-3, headroom=None, skipped=False)
    assert queue.take() == [nothing]


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_is_not_nothing(value: float) -> None:
    queue = SignalQueue()
    put(queue, 0, {"loss": [value], "norms": [1.0, value], "skipped": [1]}, "cpu")
    (seen,) = queue.take()
    assert seen.skipped
    for read in (seen.loss, seen.grad_norm):
        assert read is not None
        assert not math.isfinite(read)


def test_layers_that_saw_nothing_have_no_headroom_to_speak_of() -> None:
    queue = SignalQueue()
    put(queue, 0, {"headroom": [INF, INF]}, "cpu")
    put(queue, 1, {"headroom": [INF, -3.0, 2.0]}, "cpu")
    assert [seen.headroom for seen in queue.take()] == [None, -3.0]


def test_steps_come_in_order_and_once() -> None:
    queue = SignalQueue()
    for step in range(5):
        put(queue, step, {"loss": [float(step)]}, "cpu")
    assert [(seen.step, seen.loss) for seen in queue.take()] == [(i, float(i)) for i in range(5)]
    assert queue.take() == []


def test_a_loss_with_a_graph_is_let_go() -> None:
    queue = SignalQueue()
    loss = torch.ones((), requires_grad=True) * 2
    queue.put(
        0, loss=loss, grad_norms=[], skipped=[], headroom=None, lr=None, device=torch.device("cpu")
    )
    assert not queue._pending[0].values.requires_grad
    assert queue.take()[0].loss == 2


# -- two ranks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank read, by case."""
    directory = tmp_path_factory.mktemp("signals")
    run_on_two_ranks("tests.stability.detect.signal_ranks", directory)
    read = [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]
    return [dict(zip(CASES, one, strict=True)) for one in read]


def test_ranks_read_alike(ranks: list[dict[str, dict[str, Any]]]) -> None:
    assert repr(ranks[0]) == repr(ranks[1])  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("plain", {"loss": 2.5, "grad_norm": 3.0, "headroom": -1.0, "skipped": False}),
        ("a rank without a loss", {"loss": 2.0, "grad_norm": 1.5}),
        ("no loss at all", {"loss": None, "grad_norm": 1.5}),
        ("NaN on one rank", {"loss": NAN, "grad_norm": NAN, "skipped": False}),
        ("inf on one rank", {"loss": INF, "grad_norm": INF}),
        ("skipped on one rank", {"loss": 2.0, "skipped": True}),
        ("two optimizers", {"loss": None, "grad_norm": 5.5}),
        ("a rank that did not step", {"grad_norm": 0.25}),
        ("nobody stepped", {"loss": 1.0, "grad_norm": None, "headroom": None}),
        ("headroom on one rank", {"headroom": 3.0}),
    ],
)
def test_over_ranks(
    ranks: list[dict[str, dict[str, Any]]], case: str, expected: dict[str, Any]
) -> None:
    seen = ranks[0][case]
    assert {name: seen[name] for name in expected} == pytest.approx(expected, nan_ok=True)


# -- on the device ------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_device_a_step_is_read_one_step_late_and_nothing_waits() -> None:
    queue = SignalQueue()
    put(queue, 0, {"loss": [1.0]}, "cuda")  # warms up allocators
    queue.take(all=True)
    values = {
        "loss": torch.full((), 2.5, device="cuda"),
        "norm": torch.full((), 3.0, device="cuda"),
        "skipped": torch.zeros((), dtype=torch.bool, device="cuda"),
        "headroom": torch.full((2, 3), -1.5, device="cuda"),
    }
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            queue.put(
                step,
                loss=values["loss"],
                grad_norms=[values["norm"]],
                skipped=[values["skipped"]],
                headroom=values["headroom"],
                lr=None,
                device=torch.device("cuda"),
            )
            assert [seen.step for seen in queue.take()] == ([] if step == 1 else [1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = StepSignals(step=2, loss=2.5, grad_norm=3.0, lr=None, headroom=-1.5, skipped=False)
    assert queue.take(all=True) == [expected]
