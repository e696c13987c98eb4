"""One record per step, in automatic and in manual optimization, and the rows made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fp.stability.detect.signals import StepSignals
from lightning_fp.telemetry import OptimizerStep, SignalFeed, StepCurve, StepRecorder

CPU = torch.device("cpu")


def stepped(norm: float | None, skipped: bool | None = False, lr: float = 0.5) -> OptimizerStep:
    return OptimizerStep(
        grad_norm=None if norm is None else torch.tensor(norm),
        skipped=None if skipped is None else torch.tensor(skipped),
        hyperparameters=[{"lr": lr}],
    )


def test_the_mean_over_micro_batches_without_their_division() -> None:
    recorder = StepRecorder()
    for at, (loss, done) in enumerate([(1.0, 7), (3.0, 7), (5.0, 8)]):
        recorder.begin(7)
        recorder.micro_batch(torch.tensor(loss / 3), divided_by=3)
        if done == 8:
            recorder.stepped(stepped(2.0))
        record = recorder.end(done)
        assert (record is None) == (at < 2)
    assert record is not None
    assert record.step == 7
    assert float(record.loss) == pytest.approx(3.0)
    assert float(record.grad_norm) == 2.0
    assert record.lr == 0.5
    assert record.seconds > 0
    recorder.begin(8)
    following = recorder.end(9)
    assert following is not None
    assert following.loss is None
    assert following.optimizers == ()


def test_the_sum_of_what_manual_backward_is_given() -> None:
    """Whatever the training step returns, which need not be what is minimized."""
    recorder = StepRecorder()
    recorder.begin(0)
    recorder.backward(torch.tensor(2.0))
    recorder.stepped(stepped(3.0, lr=0.1))
    recorder.backward(torch.tensor([1.0, 0.5]))
    recorder.stepped(stepped(4.0, skipped=True, lr=0.2))
    recorder.micro_batch(torch.tensor(99.0), divided_by=1)
    record = recorder.end(2)
    assert record is not None
    assert float(record.loss) == 3.5
    assert float(record.grad_norm) == 5.0
    assert [bool(skipped) for skipped in record.skipped] == [False, True]
    assert record.lr == 0.1


@pytest.mark.parametrize("loss", [None, torch.ones(3), "no loss", {}])
def test_what_is_no_loss_is_none(loss: object) -> None:
    recorder = StepRecorder()
    recorder.begin(0)
    recorder.micro_batch(loss, divided_by=1)
    recorder.stepped(stepped(None, None))
    record = recorder.end(1)
    assert record is not None
    assert record.loss is record.grad_norm is None
    assert record.skipped == []


def record_of(step: int, loss: float | None) -> object:
    recorder = StepRecorder()
    recorder.begin(step)
    recorder.micro_batch(None if loss is None else torch.tensor(loss), divided_by=1)
    recorder.stepped(stepped(1.0))
    return recorder.end(step + 1)


def test_rows_of_the_steps_that_had_a_loss() -> None:
    curve, asked = StepCurve(CPU), []

    def over_ranks(values: Tensor) -> Tensor:
        asked.append(len(values))
        return values + 1

    assert curve.take(over_ranks) == []
    for step, loss in enumerate([2.0, None, 4.0]):
        curve.add(record_of(step, loss))
    rows = curve.take(over_ranks)
    assert [(row.step, row.loss, row.grad_norm) for row in rows] == [(1, 3.0, 1.0), (3, 5.0, 1.0)]
    assert asked == [3]
    assert curve.take(over_ranks) == []


def test_every_reader_of_the_feed_has_every_step() -> None:
    told: list[StepSignals] = []
    feed = SignalFeed(told.append)
    assert not feed.wanted
    one, other = feed.reader(), feed.reader()
    assert feed.wanted
    for step in range(3):
        feed.put(record_of(step, float(step)), None, CPU)
    assert [seen.step for seen in one.take()] == [0, 1, 2]
    assert one.take(all=True) == []
    assert [(seen.loss, seen.grad_norm, seen.lr) for seen in other.take()] == [
        (0.0, 1.0, 0.5),
        (1.0, 1.0, 0.5),
        (2.0, 1.0, 0.5),
    ]
    assert [seen.step for seen in told] == [0, 1, 2]
