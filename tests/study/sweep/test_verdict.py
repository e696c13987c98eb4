from __future__ import annotations

import math
import random

import pytest

from lightning_fp.study.sweep.verdict import LossJudge, curve_stretch


def healthy(steps: int, seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [2.5 + 3 * math.exp(-i / (steps / 6)) + noise.gauss(0, 0.05) for i in range(steps)]


def judged(losses: list[float], planned: int | None = None) -> LossJudge:
    judge = LossJudge(planned or len(losses))
    for loss in losses:
        judge.step(loss, None, 1e-3)
    return judge


@pytest.mark.parametrize("steps", [60, 200, 1000])
def test_healthy_runs_do_not_diverge(steps: int) -> None:
    for seed in range(20):
        judge = judged(healthy(steps, seed))
        result = judge.result()
        assert not judge.is_dead
        assert not result["diverged"]
        assert result["diverged_step"] is None
        assert result["final_loss"] == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("steps", [60, 200, 1000])
def test_a_rise_that_stays_is_a_divergence_from_where_it_began(steps: int) -> None:
    begin = steps // 2
    losses = [loss + (1.5 if i >= begin else 0) for i, loss in enumerate(healthy(steps))]
    judge = judged(losses)
    result = judge.result()
    assert judge.is_dead
    assert result["diverged"]
    assert abs(result["diverged_step"] - begin) <= 0.05 * steps
    assert result["spikes"] >= 1


def test_a_spike_that_heals_is_no_divergence() -> None:
    losses = healthy(400)
    losses[250:256] = [loss + 2.0 for loss in losses[250:256]]
    result = judged(losses).result()
    assert not result["diverged"]
    assert result["spikes"] == 1


def test_losses_that_are_not_finite() -> None:
    judge = judged([*healthy(200)[:100], *[math.nan] * 10], planned=200)
    assert judge.is_dead
    result = judge.result()
    assert result["diverged"]
    assert result["diverged_step"] == 101
    assert result["final_loss"] is None
    assert result["nonfinite_steps"] == 10


def test_a_run_that_rises_before_anything_is_usual() -> None:
    result = judged([5.0 + 0.1 * i for i in range(60)]).result()
    assert result["diverged"]
    assert result["why"]


def test_the_curve_has_means_of_equal_stretches() -> None:
    losses = healthy(200)
    curve = judged(losses).result()["curve"]
    stretch = curve_stretch(200)
    assert len(curve) * stretch == 200
    assert curve[3] == pytest.approx(sum(losses[3 * stretch : 4 * stretch]) / stretch, abs=1e-5)
