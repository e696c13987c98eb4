"""DivergenceDetector: quiet on healthy runs, quick on faults, and a pure, resumable machine."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp import DivergenceDetector
from lightning_fp.stability import Cause, Decision, DetectorState
from tests.stability.detect.curves import (
    FAULTS,
    HEALING,
    NOISES,
    SCHEDULES,
    Curve,
    Fault,
    Watched,
    healthy,
    recorded,
    short_run,
    watch,
    with_fault,
)

DETECTOR = DivergenceDetector()


def flat(steps: int, *, seed: int = 0, noise: float = 0.05) -> Curve:
    values = 3 + noise * np.random.default_rng(seed).standard_normal(steps)
    return Curve(name="flat", loss=values, noise=np.full(steps, noise))


def steps_of(
    losses: list[float], state: DetectorState | None = None, **signals: float
) -> tuple[DetectorState, list[Decision]]:
    state = DETECTOR.init() if state is None else state
    decisions = []
    for loss in losses:
        state, decision = DETECTOR.step(state, loss=loss, **signals)
        decisions.append(decision)
    return state, decisions


def learned(steps: int = 300, **options: float) -> DetectorState:
    return steps_of(flat(steps, **options).loss.tolist())[0]


class TestHealthyRuns:
    def test_recorded_run(self) -> None:
        curve = recorded()
        for loss_only in (False, True):
            found = watch(curve, loss_only=loss_only)
            assert not found.verdicts
            assert len(found.suspicions) <= 2
            assert {d.kind for d in found.decisions} <= {"ok", "suspect"}

    @pytest.mark.parametrize(("seed", "noise"), list(enumerate(NOISES)))
    def test_made_up_run(self, seed: int, noise: str) -> None:
        curve = healthy(seed, noise, SCHEDULES[seed % len(SCHEDULES)], steps=4_000)
        assert not watch(curve).suspicions

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_at_most_one_suspicion_per_10k_steps_and_no_verdict(self) -> None:
        suspicions = steps = 0
        for seed, (noise, schedule) in enumerate((n, s) for n in NOISES for s in SCHEDULES):
            found = watch(healthy(seed, noise, schedule))
            assert not found.verdicts, (noise, schedule)
            suspicions += len(found.suspicions)
            steps += len(found.decisions)
        assert suspicions <= steps / 10_000

    @pytest.mark.parametrize("seed", range(10))
    def test_short_run(self, seed: int) -> None:
        assert not watch(short_run(seed)).suspicions

    def test_steep_descent_that_ends_at_once(self) -> None:
        curve = flat(2_000)
        falling = np.maximum(5 - 0.02 * np.arange(2_000), 0)
        assert not watch(replace(curve, loss=curve.loss + falling)).suspicions

    def test_noise_that_doubles(self) -> None:
        curve = flat(2_000)
        curve.loss[1_000:] = 3 + 2 * (curve.loss[1_000:] - 3)
        assert not watch(curve).suspicions

    def test_constant_loss(self) -> None:
        _, decisions = steps_of([2.0] * 500)
        assert {d.kind for d in decisions} == {"ok"}

    def test_single_outliers_of_any_size(self) -> None:
        curve = flat(2_000)
        curve.loss[200::150] += np.geomspace(0.5, 1e6, 12)
        assert not watch(curve).suspicions

    def test_gradient_outliers_alone(self) -> None:
        rng = np.random.default_rng(0)
        curve = flat(3_000)
        norms = np.exp(0.2 * rng.standard_normal(3_000))
        norms[rng.integers(100, 3_000, 30)] *= 50
        assert not watch(replace(curve, grad_norm=norms)).suspicions


def places(curve: Curve, count: int) -> list[int]:
    return sorted(np.random.default_rng(1).integers(1_000, len(curve) - 1_000, count).tolist())


def watch_faults(
    curve: Curve, onsets: Sequence[int], faults: tuple[Fault, ...], *, loss_only: bool = False
) -> dict[str, list[Watched]]:
    """What is said from the onset on, for every fault and place."""
    states = watch(curve, loss_only=loss_only).states
    return {
        fault.name: [
            watch(
                with_fault(curve, fault, onset),
                state=states[onset],
                start=onset,
                loss_only=loss_only,
            )
            for onset in onsets
        ]
        for fault in faults
    }


def check_faults(found: dict[str, list[Watched]], faults: tuple[Fault, ...], least: float) -> None:
    for fault in faults:
        runs = found[fault.name]
        delays = [run.suspicions[0] for run in runs if run.suspicions]
        assert len(delays) >= least * len(runs), fault.name
        if fault.name != "slow drift":
            assert median(delays) <= 10, fault.name
        verdicts = sum(bool(run.verdicts) for run in runs)
        assert verdicts == 0 if fault.heals else verdicts >= least * len(runs), fault.name


class TestFaults:
    def test_in_recorded_run(self) -> None:
        curve = recorded()
        curve = replace(
            curve, loss=curve.loss[3_000:7_000], lr=curve.lr[3_000:], noise=curve.noise[3_000:]
        )
        curve = replace(curve, grad_norm=curve.grad_norm[3_000:])
        check_faults(watch_faults(curve, range(1_000, 3_600, 500), FAULTS), FAULTS, 1.0)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("loss_only", [False, True])
    def test_in_recorded_run_at_40_places(self, loss_only: bool) -> None:
        curve = recorded()
        faults = (*FAULTS, *HEALING)
        found = watch_faults(curve, places(curve, 40), faults, loss_only=loss_only)
        check_faults(found, faults, 0.95)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("noise", ["normal", "heavy-tailed", "growing", "shrinking", "skewed"])
    def test_in_made_up_runs(self, noise: str) -> None:
        faults = (*FAULTS, *HEALING)
        found: dict[str, list[Watched]] = {fault.name: [] for fault in faults}
        for seed, schedule in enumerate(("constant", "cosine", "cooldown")):
            curve = healthy(100 + seed, noise, schedule)
            for name, runs in watch_faults(curve, places(curve, 10), faults).items():
                found[name] += runs
        check_faults(found, faults, 0.9)

    @pytest.mark.parametrize("fault", HEALING, ids=lambda fault: fault.name)
    def test_what_heals_is_suspected_and_over(self, fault: Fault) -> None:
        found = watch(with_fault(flat(1_000), fault, 500))
        assert len(found.suspicions) == 1
        assert 500 <= found.suspicions[0] <= 512
        assert not found.verdicts
        assert found.decisions[-1].kind == "ok"

    @pytest.mark.parametrize("seed", range(5))
    def test_blow_up_of_a_short_run(self, seed: int) -> None:
        curve = with_fault(short_run(seed), FAULTS[0], 150)
        assert 150 < watch(curve).suspicions[0] <= 162

    @pytest.mark.parametrize("seed", range(5))
    def test_rise_on_a_falling_loss_does_not_heal_by_the_fall(self, seed: int) -> None:
        curve = flat(1_600, seed=seed)
        curve = replace(curve, loss=curve.loss + 8 * (1 + np.arange(1_600) / 20) ** -0.5)
        found = watch(with_fault(curve, Fault(name="", rise=lambda k: 3 + 0 * k), 600))
        assert found.verdicts

    def test_onset_is_the_first_step_of_a_step(self) -> None:
        found = watch(with_fault(flat(1_000), FAULTS[3], 500))
        at = found.suspicions[0]
        decision = found.decisions[at]
        assert decision.onset is not None
        assert abs(at - decision.onset - 500) <= 2
        assert found.decisions[at + 10].onset == decision.onset + 10

    def test_baseline_and_noise_are_those_before(self) -> None:
        found = watch(with_fault(flat(1_000), FAULTS[3], 500))
        last = found.decisions[-1]
        assert last.kind == "diverged"
        assert last.cause is Cause.LASTING
        assert last.baseline == pytest.approx(3, abs=0.03)
        assert last.noise == pytest.approx(0.05, rel=0.25)
        assert last.score == pytest.approx((last.loss - last.baseline) / last.noise)
        assert "the loss rose and does not come back" in last.reason

    def test_gradient_norm_that_stays_high(self) -> None:
        curve = flat(600)
        norms = np.exp(0.1 * np.random.default_rng(0).standard_normal(600))
        norms[400:] *= 20
        found = watch(replace(curve, grad_norm=norms))
        assert found.decisions[found.suspicions[0]].cause is Cause.GRADIENT
        assert 402 <= found.suspicions[0] <= 406
        assert not found.verdicts
        assert found.decisions[-1].kind == "ok"

    def test_updates_that_stay_large(self) -> None:
        rng = np.random.default_rng(0)
        state = DETECTOR.init()
        for i in range(250):
            ratio = 1e-3 * math.exp(0.1 * rng.standard_normal()) * (30 if i >= 200 else 1)
            state, decision = DETECTOR.step(state, loss=3.0, update_ratio=ratio)
            if decision.kind != "ok":
                break
        assert decision.cause is Cause.UPDATE


class TestNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("signal", ["loss", "grad_norm", "update_ratio"])
    def test_one_is_skipped_and_forgotten(self, signal: str, bad: float) -> None:
        before = learned()
        signals = {"loss": 3.0, "grad_norm": 1.0, "update_ratio": 1e-3, signal: bad}
        state, decision = DETECTOR.step(before, **signals)
        assert (decision.kind, decision.skip) == ("skip", True)
        _, decisions = steps_of([3.0] * 100, state)
        assert {d.kind for d in decisions} == {"ok"}

    def test_skipped_by_a_guard(self) -> None:
        _, decision = DETECTOR.step(learned(), loss=3.0, skipped=True)
        assert decision.kind == "skip"

    def test_four_in_a_row_are_suspicious(self) -> None:
        _, decisions = steps_of([math.nan] * 4, learned())
        assert [d.kind for d in decisions] == ["skip"] * 3 + ["suspect"]
        assert all(d.skip for d in decisions)
        assert decisions[-1].onset == 3

    def test_what_stays_is_a_divergence(self) -> None:
        state, decisions = steps_of([math.nan] * 60, learned())
        kinds = [d.kind for d in decisions]
        assert "diverged" not in kinds[:40]
        assert kinds[40:] == ["diverged"] * 20
        _, decisions = steps_of([3.0] * 40, state)
        assert decisions[-1].kind == "ok"

    def test_a_loss_scaler_that_looks_for_its_scale(self) -> None:
        _, decisions = steps_of([5.0] * 12, skipped=True)
        assert {d.kind for d in decisions} == {"skip"}

    def test_never_finite_from_the_start(self) -> None:
        _, decisions = steps_of([math.nan] * 80)
        assert decisions[-1].kind == "diverged"
        assert decisions[-1].baseline is None


class TestLearningRate:
    def rising(self, lr: np.ndarray) -> Watched:
        """A loss that rises by four standard deviations with the learning rate, at step 500."""
        curve = flat(1_000)
        rise = np.clip((np.arange(1_000) - 500) / 30, 0, 1)
        return watch(replace(curve, loss=curve.loss + 0.2 * rise, lr=lr))

    def test_a_jump_explains_a_rise(self) -> None:
        lr = np.where(np.arange(1_000) < 500, 1e-4, 1e-3)
        assert not self.rising(lr).suspicions
        assert self.rising(np.full(1_000, 1e-4)).verdicts

    def test_a_smooth_rise_too(self) -> None:
        lr = 1e-4 * (1 + 9 * np.clip((np.arange(1_000) - 480) / 40, 0, 1))
        assert not self.rising(lr).suspicions

    def test_a_smooth_schedule_does_not(self) -> None:
        lr = 1e-3 * (0.55 + 0.45 * np.cos(np.pi * np.arange(1_000) / 1_000))
        assert self.rising(lr).verdicts

    def test_blow_up_right_after_a_jump_is_found(self) -> None:
        curve = flat(1_000)
        lr = np.where(np.arange(1_000) < 500, 1e-4, 3e-3)
        curve = with_fault(replace(curve, lr=lr), FAULTS[0], 520)
        assert 520 < watch(curve).suspicions[0] < 540


class TestWhatWasDone:
    def incident(self) -> DetectorState:
        curve = with_fault(flat(1_000), FAULTS[3], 500)
        return watch(curve).states[540]

    def test_after_a_rollback_the_old_level_is_in_force(self) -> None:
        before = self.incident()
        state = DETECTOR.rolled_back(before)
        state, decisions = steps_of(flat(200, seed=1).loss.tolist(), state)
        assert {d.kind for d in decisions} == {"ok"}
        _, decisions = steps_of(
            (flat(60, seed=1).loss + 0.2).tolist(), DETECTOR.rolled_back(before)
        )
        assert "suspect" in {d.kind for d in decisions}

    def test_a_rise_after_a_change_of_precision_is_seen(self) -> None:
        state = DETECTOR.precision_changed(learned())
        _, decisions = steps_of((flat(60, seed=1).loss + 0.175).tolist(), state)
        kinds = [d.kind for d in decisions]
        assert set(kinds[: DETECTOR.grace]) == {"ok"}
        assert DETECTOR.grace < kinds.index("suspect") < DETECTOR.grace + 15

    def test_grace_does_not_hide_a_blow_up(self) -> None:
        state = DETECTOR.precision_changed(learned())
        _, decisions = steps_of([3.0, 4.0, 5.0, 6.0, 7.0], state)
        assert decisions[-1].kind == "suspect"

    def test_what_was_cleared_is_the_new_level(self) -> None:
        state = DETECTOR.cleared(self.incident())
        _, decisions = steps_of((flat(300, seed=1).loss + 0.175).tolist(), state)
        assert {d.kind for d in decisions} == {"ok"}
        assert decisions[-1].baseline == pytest.approx(3.175, abs=0.03)

    def test_cleared_of_what_is_not_finite(self) -> None:
        state, _ = steps_of([math.nan] * 10, learned())
        _, decision = DETECTOR.step(DETECTOR.cleared(state), loss=math.nan)
        assert decision.kind == "skip"


def same(a: list[Decision], b: list[Decision]) -> bool:
    return repr(a) == repr(b)  # NaN equals itself here


class TestState:
    curve = with_fault(flat(800), FAULTS[3], 400)

    @settings(max_examples=20, deadline=None)
    @given(at=st.integers(0, 640))
    def test_saved_and_loaded_it_continues_bit_for_bit(self, at: int) -> None:
        found = watch(self.curve)
        file = io.BytesIO()
        torch.save(DETECTOR.state_dict(found.states[at]), file)
        file.seek(0)
        state = DETECTOR.load_state_dict(torch.load(file, weights_only=True))
        assert state == found.states[at]
        rest = watch(self.curve, state=state, start=at)
        assert same(rest.decisions, found.decisions[at:])

    @settings(max_examples=20, deadline=None)
    @given(
        losses=st.lists(
            st.one_of(st.none(), st.floats(width=32), st.floats(2.9, 3.1)), max_size=200
        )
    )
    def test_takes_any_numbers_and_changes_no_state(self, losses: list[float | None]) -> None:
        state = learned(80)
        states = [state]
        for loss in losses:
            state, decision = DETECTOR.step(state, loss=loss, grad_norm=loss, lr=loss)
            assert decision.reason
            states.append(state)
        again = learned(80)
        for loss, state in zip(losses, states, strict=False):
            assert repr(again) == repr(state)
            again, _ = DETECTOR.step(again, loss=loss, grad_norm=loss, lr=loss)

    @settings(max_examples=10, deadline=None)
    @given(power=st.integers(-2, 6))
    def test_units_of_the_loss_do_not_matter(self, power: int) -> None:
        scaled = replace(self.curve, loss=self.curve.loss * 2.0**power)
        kinds = [[d.kind for d in watch(curve).decisions] for curve in (self.curve, scaled)]
        assert kinds[0] == kinds[1]

    @pytest.mark.parametrize(
        "broken", [{}, {"version": 0}, {"version": 1}, {"version": 1, "loss": {}}]
    )
    def test_what_is_not_a_state_is_refused(self, broken: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"must have version|state_dict must have"):
            DETECTOR.load_state_dict(broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cusum": 0},
        {"slack": -1},
        {"armed": 3},
        {"healed": 2.0},
        {"undecided": 10},
        {"lr_rise": 1.0},
        {"least_noise": 0},
    ],
)
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        DivergenceDetector(**wrong)  # type: ignore[arg-type]


def test_a_step_makes_few_calls() -> None:
    # Its time is measured in benchmarks/detector.py. Calls are the same on every machine.
    state, calls = DETECTOR.init(), 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    losses = flat(400).loss.tolist()
    sys.setprofile(count)
    try:
        for loss in losses:
            state, _ = DETECTOR.step(state, loss=loss, grad_norm=1.0, lr=1e-3)
    finally:
        sys.setprofile(None)
    print(calls / len(losses))
    assert calls < 150 * len(losses)
