"""Each incident has one finding, whatever its tests say one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fp.records import Note, Verdict
from lightning_fp.report.read.incidents import incidents
from tests.report.traced import traced_events

FOUND = {
    "backward-clamp": ["precision"],
    "outliers": ["precision"] * 4,
    "outlier-tokens": ["precision", "precision"],
    "fp16": ["precision"],
    "shuffled-labels": ["not precision"],
    "nan-data": ["not precision", "not precision"],
    "gan": ["not precision", "not precision"],
    "stuck-scale": [],
    "healthy": [],
}


@pytest.mark.parametrize("name", FOUND)
def test_one_finding_each(name: str, tmp_path: Path) -> None:
    events = traced_events(name, tmp_path)
    assert [incident.finding for incident in incidents(events)] == FOUND[name]


def test_what_the_run_did_decides_and_not_a_single_test(tmp_path: Path) -> None:
    (incident,) = incidents(traced_events("backward-clamp", tmp_path / "a"))
    tests = [event.verdict for event in incident.events if isinstance(event, Verdict)]
    assert tests == ["unclear", "precision", "precision"]
    assert incident.why.startswith("trained again in the run's own formats")
    assert incident.demotion is not None
    assert incident.rollback is not None
    assert incident.rollback.to_step == 146
    *_, last = incidents(traced_events("outlier-tokens", tmp_path / "b"))
    tests = [event.verdict for event in last.events if isinstance(event, Verdict)]
    assert tests == ["precision", "not precision", "precision"]
    assert last.finding == "precision"


def test_two_tests_that_contradict_each_other_decide_nothing() -> None:
    first = Verdict(step=5, reason="r", verdict="precision", tier="one step")
    second = Verdict(step=5, reason="s", verdict="not precision", tier="trajectory")
    assert [each.finding for each in incidents([first, second])] == ["unclear"]
    acquittal = Note(step=5, reason="formats stay as they are; look at the data")
    (cleared,) = incidents([first, second, acquittal])
    assert (cleared.finding, cleared.likeness) == ("not precision", "look at the data")


def test_an_acquittal_for_now_is_told_apart(tmp_path: Path) -> None:
    (for_now,) = incidents(traced_events("resume", tmp_path / "a"))
    assert for_now.provisional
    (firm,) = incidents(traced_events("shuffled-labels", tmp_path / "b"))
    assert not firm.provisional
