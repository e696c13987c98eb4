"""What a run cost, from its records alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fp.records import (
    Demotion,
    Event,
    LayerClimb,
    Note,
    Promotion,
    Replayed,
    Rollback,
    SkippedStep,
    Started,
)
from lightning_fp.report import RunRecords, run_cost
from lightning_fp.report.read.digest import Digest
from lightning_fp.report.read.steps import Steps, read_steps
from lightning_fp.telemetry.casts.sampling import SampledSteps


def steps(seconds: list[float], repeated: int = 0, repeated_seconds: float = 0.0) -> Steps:
    count = len(seconds)
    return Steps(
        steps=torch.arange(1, count + 1),
        losses=torch.linspace(3, 2, count, dtype=torch.float64),
        grad_norms=torch.full((count,), torch.nan, dtype=torch.float64),
        seconds=torch.tensor(seconds, dtype=torch.float64),
        repeated=repeated,
        repeated_seconds=repeated_seconds,
    )


def digest(sampled: list[int]) -> Digest:
    return Digest(
        layers=(),
        columns=((160, 160),),
        intervals=1,
        rows=1,
        sampled_at=torch.tensor(sampled),
        grids={},
        formats=torch.zeros(0, 1),
        format_names=(),
    )


def records(*events: Event, seconds: list[float] | None = None, **more: object) -> RunRecords:
    own = None if seconds is None else steps(seconds)
    return RunRecords(path=Path("run"), name="run", events=events, steps=own, **more)  # pyright: ignore


SKIPS = tuple(SkippedStep(step=step, reason="") for step in (12, 30))
ROLLBACK = Rollback(step=20, to_step=10, replayed=7, reason="")


def test_a_run_that_crashed_is_accounted_from_its_events() -> None:
    cost = run_cost(records(*SKIPS, ROLLBACK, seconds=[0.1] * 100))
    assert (cost.attempted, cost.skipped, cost.rolled_back, cost.made_good) == (100, 2, 10, 7)
    # of the ten undone one had been skipped anyway
    assert cost.useful == 100 - 2 - 9 + 7
    assert cost.replayed_steps is None
    assert cost.seconds == pytest.approx(10)


def test_what_the_run_says_at_its_end_counts() -> None:
    numbers = {"attempted": 100, "useful": 90, "skipped": 4, "rolled_back": 8, "made_good": 2}
    end = Note(step=100, reason="", numbers={**numbers, "replayed": 33})
    cost = run_cost(records(*SKIPS, end, seconds=[0.1] * 100))
    assert (cost.useful, cost.skipped, cost.replayed_steps) == (90, 4, 33)
    # ... but not after it has gone on
    cost = run_cost(records(*SKIPS, end, seconds=[0.1] * 120))
    assert (cost.attempted, cost.useful, cost.skipped) == (120, 118, 2)


def test_speed_against_a_baseline() -> None:
    baseline = RunRecords(path=Path("b"), name="b", steps=steps([9.0, *[0.2] * 9]))
    run = records(*SKIPS, seconds=[*[0.1] * 90, *[0.6] * 10])
    cost = run_cost(run, baseline)
    assert cost.raw_speedup == pytest.approx(2)
    assert cost.effective_speedup == pytest.approx(98 * 0.2 / 15)
    assert "1.31x as fast as the baseline, all counted (2.00x per step)" in cost.sentence()


def test_steps_repeated_after_a_resume_cost_time() -> None:
    run = RunRecords(path=Path("r"), name="r", steps=steps([0.1] * 100, 50, 5.0))
    cost = run_cost(run, RunRecords(path=Path("b"), name="b", steps=steps([0.1] * 10)))
    assert (cost.attempted, cost.repeated) == (100, 50)
    assert cost.effective_speedup == pytest.approx(100 / 150)


def test_times_that_a_crash_has_lost_are_made_up_for() -> None:
    cost = run_cost(records(Started(step=0, reason=""), SKIPS[1], seconds=[0.1] * 20))
    assert cost.attempted == 30
    assert cost.seconds == pytest.approx(3.0)


def test_the_unknown_stays_unknown() -> None:
    cost = run_cost(records(Started(step=0, reason="")))
    assert cost.attempted == 0
    unknown = (cost.seconds, cost.step_seconds, cost.raw_speedup, cost.effective_speedup)
    assert {*unknown, cost.telemetry_seconds, cost.probe_seconds, cost.useful_share} == {None}
    assert "no step is recorded" in cost.sentence()
    cost = run_cost(records(seconds=[0.1] * 20))
    assert cost.effective_speedup is None
    assert "lightning-fp baseline" in cost.sentence()


def test_steps_in_fallback() -> None:
    events = (
        Demotion(step=10, reason="", formats={"a": ("fp8-delayed", "bf16")}),
        LayerClimb(step=15, reason="", formats={"b": ("fp8-delayed", "fp8-dynamic")}),
        Promotion(step=30, reason="", formats={"a": ("bf16", "fp8-delayed")}),
        Promotion(step=40, reason="", formats={"b": ("fp8-dynamic", "fp8-delayed")}),
        Demotion(step=90, reason="", formats={"a": ("fp8-delayed", "bf16")}),
        Demotion(step=50, reason="", formats={"c": ("x", "y")}, action="dry run: nothing changed"),
    )
    assert run_cost(records(*events, seconds=[0.1] * 100)).in_fallback == 30 + 10


def test_telemetry_is_what_sampled_steps_take_more() -> None:
    sampling = SampledSteps(8, 3)
    seconds = [0.15 if sampling.take(step) else 0.1 for step in range(160)]
    seconds[50] = 30.0  # an incident is no telemetry
    sampled = [step for step, each in enumerate(seconds, start=1) if each == 0.15]
    run = records(seconds=seconds, statistics=digest(sampled))
    assert run_cost(run).telemetry_seconds == pytest.approx(20 * 0.05)
    # ... and unknown where the statistics do not tell
    assert run_cost(records(seconds=seconds, statistics=digest([]))).telemetry_seconds is None


def test_incidents_and_memory() -> None:
    replay = Replayed(step=50, reason="one step")
    started = Started(step=0, reason="", numbers={"all_snapshots_bytes": 5.0, "other": 1.0})
    end = {"attempted": 100.0, "useful": 100.0, "peak_memory_bytes": 7.0}
    seconds = [0.1] * 50 + [3.1] + [0.1] * 49
    run = records(started, replay, Note(step=100, reason="", numbers=end), seconds=seconds)
    cost = run_cost(run)
    assert cost.replays == 1
    assert cost.incident_seconds == pytest.approx(3.0)
    assert sorted(cost.memory.values()) == [5.0, 7.0]


def test_steps_of_a_resumed_run(tmp_path: Path) -> None:
    lines = ["step,loss,grad_norm,seconds", "1,3.0,,0.5", "2,2.5,1.0,0.5", "3,2.4,,0.5"]
    lines += ["2,nan,2.0,0.25", "3,inf,,", "4,2"]  # resumed after 1, and torn in mid-line
    (tmp_path / "loss.csv").write_text("\n".join(lines))
    found = read_steps(tmp_path)
    assert found is not None
    assert found.steps.tolist() == [1, 2, 3]
    assert found.losses.isfinite().tolist() == [True, False, False]
    assert found.grad_norms.isnan().tolist() == [True, False, True]
    assert (found.repeated, found.repeated_seconds) == (2, 1.0)
    assert found.seconds_per_step() == 0.25


def test_replays_stand_beside_their_limit() -> None:
    budget = {"replay_incident": 384.0, "replay_share": 0.05}
    account = {"attempted": 480.0, "useful": 480.0, "replayed": 363.0}
    events = (
        Started(step=0, reason="", numbers=budget),
        Note(step=480, reason="", numbers=account),
    )
    records = RunRecords(path=Path(), name="run", events=events)
    assert run_cost(records).replays_in_words() == (
        "Replays took 363 training steps, 76% of the run's own 480. The limit is 384 steps plus 5%"
        " of the run's own: 408 in a run of this length."
    )
