"""What happened as rows: one for each decision, what it rests on beneath."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fp.records import Event, Rollback, SkippedStep
from lightning_fp.records.events import FormatChange, GateResult, Rehearsed, StageChange, Started
from lightning_fp.report.draw.decisions import decisions, events_table
from lightning_fp.report.draw.sentences import went_back
from tests.report.traced import NAMES, traced_events


def test_an_incident_is_one_row_with_one_conclusion(tmp_path: Path) -> None:
    found = decisions(traced_events("backward-clamp", tmp_path), "FP8")
    assert [row.what for row in found] == ["start", "trial replay", "incident", "end"]
    incident = found[2]
    assert incident.why == (
        "FP8 was at fault: trained again in the run's own formats, the same steps show all of the"
        " harm; a placebo, tiny random changes of the weights, makes a difference of 0.00287."
        " So head went from fp8-dynamic to fp32, and the run went back to step 146 and trained the"
        " 18 steps since then again, in high precision."
    )
    heads = [line.split(":")[0].split(" (")[0] for line in incident.details]
    assert heads == ["alarm", "test 1", "test 2", "test 3", "who"]
    assert "in FP8 and in high precision) says too little" in incident.details[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_incident_is_told_twice(name: str, tmp_path: Path) -> None:
    rows = events_table(traced_events(name, tmp_path)).rows
    steps = [step for step, what, _ in rows if what == "incident"]
    assert len(steps) == len(set(steps))
    told = "\n".join(" ".join(row) for row in rows)
    for court_word in ("verdict", "suspicion", "rollback", "->", "clamped_mass", "sqnr_db"):
        assert court_word not in told


def test_the_check_of_a_cure_stands_with_its_layer(tmp_path: Path) -> None:
    found = decisions(traced_events("stuck-scale", tmp_path))
    moved = [row for row in found if row.what == "safer format"]
    assert len(moved) == 4
    assert moved[0].why == (
        "blocks.1.attention.out went from fp8-delayed to fp8-dynamic: clamped mass of grad_output"
        " is 95.7% (limit 1%)"
    )
    assert all(row.details[0].startswith("afterwards: cured: ") for row in moved)


def test_a_stage_is_one_decision_with_its_gates_inside() -> None:
    gates = [
        GateResult(step=9, reason=f"x is {i}, below 5", stage="a", statistic="x", passed=True)
        for i in range(2)
    ]
    stage = StageChange(step=9, reason="all gates pass", stage="b", previous="a")
    formats = {"up": ("bf16", "fp8-delayed"), "down": ("bf16", "fp8-delayed")}
    write = FormatChange(step=9, reason="rollout stage b: all gates pass", formats=formats)
    (found,) = decisions([*gates, stage, write])
    assert (found.step, found.what) == (9, "rollout")
    assert found.why == "stage 'b': up and down went from bf16 to fp8-delayed: all gates pass"
    assert found.details == ("gate passed: x is 0, below 5", "gate passed: x is 1, below 5")


def test_of_gates_without_a_stage_the_one_that_failed_comes_first() -> None:
    def gate(passed: bool) -> GateResult:
        return GateResult(step=9, reason="x is 1", stage="a", statistic="x", passed=passed)

    (found,) = decisions([gate(True), gate(False)])
    assert (found.what, found.why, found.details) == ("gate", "failed: x is 1", ("passed: x is 1",))


def test_neither_memory_nor_state_is_a_decision() -> None:
    started = Started(step=0, reason="snapshots take 8.1 MiB of host memory")
    line = "on_train_batch_end of Losses changes self.losses"
    rehearsed = Rehearsed(step=3, reason=f"{line}, which is put back", outcome="passed",
                          put_back=(line,))  # fmt: skip
    start, trial = decisions([started, rehearsed])
    assert "MiB" not in start.why
    assert trial.why.startswith("a few steps were replayed on trial and left nothing behind")
    assert trial.details == (f"{line}, which is put back",)
    assert not start.decides
    assert not trial.decides


@pytest.mark.parametrize(
    ("replayed", "said"),
    [
        (5, "the run went back to step 4 and trained the 5 steps since then again, in high"
            " precision"),
        (3, "the run went back to step 4 and trained the 3 steps since then again, in high"
            " precision; 2 are lost"),
        (0, "the run went back to step 4; 5 steps since then are lost, it goes on with new data"),
    ],
)  # fmt: skip
def test_a_way_back_in_words(replayed: int, said: str) -> None:
    assert went_back(Rollback(step=9, to_step=4, replayed=replayed, reason="")) == said


def test_a_single_step_back_in_words() -> None:
    one = went_back(Rollback(step=5, to_step=4, replayed=1, reason=""))
    assert (
        one
        == "the run went back to step 4 and trained the 1 step since then again, in high precision"
    )


def test_thousands_of_skips_are_few_rows() -> None:
    events: list[Event] = [SkippedStep(step=step, reason="") for step in range(0, 60_000, 7)]
    assert len(events_table(events).rows) <= 151
    row = [SkippedStep(step=step, reason="x: the optimizer step was skipped") for step in (3, 4, 5)]
    ((step, what, why),) = events_table(row).rows
    assert (step, what, why) == ("3", "skipped", "3 steps were skipped, the last at step 5: x")
