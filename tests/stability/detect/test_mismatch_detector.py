"""The early warning comes early, and not at all where nothing grows."""

from __future__ import annotations

import math
import random

import pytest

from lightning_fp.stability.detect.mismatch_detector import MismatchDecision, MismatchDetector

USUAL = 1e-3


def signals(
    seed: int, steps: int, *, noise: float = 0.2, alike: float = 0.0, growth: float = 0.0
) -> list[tuple[float, float]]:
    """Mean absolute log-ratio and k3 of every step: log-normal around a level that may grow.

    `alike` is the correlation of neighbours, `growth` that of the logarithm per step from 200 on.
    """
    generator = random.Random(f"mismatch {seed}")
    values, x = [], generator.gauss(0, 1)
    for step in range(steps):
        x = alike * x + math.sqrt(1 - alike**2) * generator.gauss(0, 1)
        r = USUAL * math.exp(noise * x + growth * max(0, step - 200))
        values.append((r, r * r / 2 * math.exp(generator.gauss(0, 0.3))))
    return values


def warnings(values: list[tuple[float, float]]) -> list[tuple[int, MismatchDecision]]:
    detector = MismatchDetector()
    state, found = detector.init(), []
    for step, (r, k3) in enumerate(values):
        state, decision = detector.step(state, abs_diff=r, k3=k3)
        if decision.began:
            found.append((step, decision))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_warning_of_stationary_noise(seed: int) -> None:
    noise, alike = ((0.05, 0.0), (0.1, 0.8), (0.4, 0.0), (0.2, 0.8))[seed % 4]
    assert warnings(signals(seed, 2000, noise=noise, alike=alike)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("span", [10, 50, 200])
def test_warning_long_before_collapse(seed: int, span: int) -> None:
    """Where the mismatch grows by e in `span` steps: at 4 times the usual, not at 100 times."""
    found = warnings(signals(seed, 200 + 2 * span, noise=0.1, growth=1 / span))
    step, decision = found[0]
    assert math.exp((step - 200) / span) < 4
    assert decision.factor is not None
    assert decision.factor > 1.3
    assert decision.onset is not None
    assert abs(step - decision.onset - 200) < max(20, span)
    assert "times the usual" in decision.reason


def test_a_jump_is_noticed_at_once_and_told_once() -> None:
    """As when the engine misses new weights: said once while it lasts, and again when it recurs."""
    quiet = signals(0, 500, noise=0.1)
    raised = [(20 * r, 400 * k3) for r, k3 in quiet[:40]]
    steps = [step for step, _ in warnings(quiet[:100] + raised + quiet[100:300] + raised)]
    assert len(steps) == 2
    assert 100 <= steps[0] < 106
    assert 340 <= steps[1] < 346


def test_one_bad_step_is_no_warning() -> None:
    values = signals(0, 300, noise=0.1)
    values[150] = (1.0, 100.0)
    assert warnings(values) == []


def test_equal_sides_and_missing_values_say_nothing() -> None:
    """k3 of engines that agree to the last bit is 0, that of an empty step NaN."""
    detector = MismatchDetector()
    state = detector.init()
    for _ in range(100):
        state, decision = detector.step(state, abs_diff=0.0, k3=0.0)
        assert not decision.raised
    before = state
    state, decision = detector.step(state, abs_diff=math.nan, k3=None)
    assert state == before
    assert not decision.raised
    assert decision.usual is None


def test_continues_from_a_checkpoint() -> None:
    detector = MismatchDetector()
    values = signals(0, 300, growth=0.02)
    state = detector.init()
    for r, k3 in values[:230]:
        state, _ = detector.step(state, abs_diff=r, k3=k3)
    loaded = detector.load_state_dict(detector.state_dict(state))
    assert loaded == state
    for r, k3 in values[230:]:
        state, decision = detector.step(state, abs_diff=r, k3=k3)
        loaded, other = detector.step(loaded, abs_diff=r, k3=k3)
        assert (loaded, other) == (state, decision)
    assert decision.raised
    with pytest.raises(ValueError, match="the mismatch detector's state must have version 1"):
        detector.load_state_dict({})


def test_after_a_change_of_precision_the_usual_level_stays() -> None:
    """What was done did not help: the warning comes again."""
    detector = MismatchDetector()
    state = detector.init()
    values = signals(0, 200, noise=0.1) + [(10 * r, 100 * k) for r, k in signals(1, 80, noise=0.1)]
    began = []
    for step, (r, k3) in enumerate(values):
        state, decision = detector.step(state, abs_diff=r, k3=k3)
        if decision.began:
            began.append(step)
            state = detector.precision_changed(state)
    assert len(began) > 1
    assert decision.usual == pytest.approx(USUAL, rel=0.5)


@pytest.mark.parametrize("field", ["armed", "cusum", "slack", "drift", "least_noise"])
def test_bad_options(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        MismatchDetector(**{field: -1})
