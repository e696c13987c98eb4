"""A run in three to seven sentences, from what real runs have written."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from lightning_fp.records import EventWriter, Resumed
from lightning_fp.records.events import (
    FormatChange,
    GateResult,
    Promotion,
    Rehearsed,
    StageChange,
    UnprovenClimb,
    WatchFailed,
)
from lightning_fp.report.draw import sentences
from lightning_fp.report.read.run_records import read_records
from lightning_fp.report.sections import story as module
from lightning_fp.report.sections.story import story
from tests.report.traced import NAMES, write_traced


def told(name: str, directory: Path) -> list[str]:
    return story(read_records(write_traced(name, directory)))


@pytest.mark.parametrize("name", NAMES)
def test_three_to_seven_sentences_in_plain_words(name: str, tmp_path: Path) -> None:
    found = told(name, tmp_path)
    assert 3 <= len(found) <= 7
    for sentence in found:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not any(word in sentence for word in ("MiB", "verdict", "rollback", "/max", "_mass"))


def test_a_rescue(tmp_path: Path) -> None:
    assert told("forward-drift", tmp_path) == [
        "All 9 layers were in fp8-dynamic at the beginning.",
        "At step 211, there was an alarm: on 8 batches the loss is 5.4% lower in high precision."
        " FP8 was at fault: trained again in the run's own formats, the same steps show all of the"
        " harm. So head went from fp8-dynamic to fp32, and the run went back to step 146 and"
        " trained the 65 steps since then again, in high precision.",
        "No decision followed after step 211, and the run ended at step 280, with 8 of 9 layers in"
        " FP8.",
    ]


def test_layers_over_a_limit_are_told_together(tmp_path: Path) -> None:
    found = told("stuck-scale", tmp_path / "many")
    assert found[1] == (
        "At steps 154 and 157, 4 layers needed a safer format and went to fp8-dynamic; the first:"
        " clamped mass of grad_output is 95.7% (limit 1%)."
    )
    found = told("gradient-overflow", tmp_path / "one")
    assert found[1] == (
        "At step 155, head went from fp8-delayed to fp8-dynamic: SQNR of grad_output is 12.7 dB"
        " (limit 15 dB)."
    )


def test_an_innocent_run(tmp_path: Path) -> None:
    found = told("shuffled-labels", tmp_path / "labels")
    assert "FP8 was not at fault: the loss rises in high precision too, 101% as much" in found[1]
    assert "No format was changed; it looks like the data" in found[1]
    found = told("nan-data-burst", tmp_path / "nan")
    assert found[1] == "At step 150, 1 step was skipped: a gradient was inf or NaN."
    assert found[3] == "At steps 151 and 152, 2 steps were skipped: a gradient was inf or NaN."


def test_a_healthy_run(tmp_path: Path) -> None:
    assert told("healthy", tmp_path) == [
        "All 9 layers were in fp8-delayed from the first step to the last.",
        "PrecisionFallback found nothing to change: no format changed, no step was undone.",
        "The run ended at step 96.",
    ]


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    directory = write_traced("backward-clamp", tmp_path)
    log = directory / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert story(read_records(directory))[-1].startswith("The records break off at step 164")


def test_what_is_rare(tmp_path: Path) -> None:
    directory = write_traced("healthy", tmp_path)
    (directory / "events.jsonl").unlink()
    log = EventWriter(directory)
    head = {"head": ("fp8-delayed", "bf16")}
    back = {"head": ("bf16", "fp8-delayed")}
    for event in (
        StageChange(step=90, reason="the rollout begins", stage="a", previous=""),
        StageChange(step=91, reason="10 steps", stage="b", previous="a"),
        FormatChange(step=91, reason="rollout stage b: 10 steps", formats=head),
        GateResult(step=92, reason="the loss is 9", stage="b", statistic="loss", passed=False),
        StageChange(step=92, reason="the loss is 9", stage="a", previous="b"),
        FormatChange(step=92, reason="rollout stage a: the loss is 9", formats=back),
        UnprovenClimb(step=93, reason="a suspicion", formats=head),
        Promotion(step=94, reason="over", formats=back),
        WatchFailed(step=95, reason="RuntimeError"),
    ):
        log.append(event)
    assert story(read_records(directory))[1:-1] == [
        "The rollout went on: at step 91 stage 'b' began (1 layer to bf16).",
        "At step 92, a gate of the rollout failed: the loss is 9; so it went back to 'a' (1 layer"
        " to fp8-delayed).",
        "At step 93, 1 layer got a safer format without proof: nothing could be replayed.",
        "At step 94, head got its format back.",
        "At step 95, the watch failed, and the run went on unprotected.",
    ]
    log.append(Rehearsed(step=96, reason="", outcome="limits only"))
    log.append(Resumed(step=97, reason=""))
    found = story(read_records(directory))
    assert found[-2] == "Besides, 3 more things happened: see the table."


@pytest.mark.parametrize("tried", [module, sentences])
def test_examples(tried: object) -> None:
    found = doctest.testmod(tried)  # pyright: ignore[reportArgumentType]
    assert found.attempted > 0
    assert found.failed == 0
