"""Events as marks in four lanes, each shape with a line in the key."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from lightning_fp.records import Event, SkippedStep
from lightning_fp.report.draw.marks import LANES, lanes, undone, undone_in_words
from tests.report.traced import NAMES, traced_events


def test_charts_can_draw_every_shape() -> None:
    script = (resources.files("lightning_fp.report") / "templates" / "charts.js").read_text()
    drawn = set(re.findall(r"(\w+): \[\"M", script))
    assert {shape for shapes in LANES.values() for shape in shapes} <= drawn


@pytest.mark.parametrize("name", NAMES)
def test_every_mark_is_in_the_key(name: str, tmp_path: Path) -> None:
    found = lanes(traced_events(name, tmp_path), 250, "FP8")
    assert len(found) <= 4
    for lane in found:
        assert {mark["shape"] for mark in lane["marks"]} == {key["shape"] for key in lane["key"]}


def test_an_incident_is_one_mark(tmp_path: Path) -> None:
    events = traced_events("backward-clamp", tmp_path)
    marks = {lane["name"]: lane["marks"] for lane in lanes(events, 180, "FP8")}
    (incident,), (safer,), (back,) = (marks[name] for name in ("incidents", "layers", "steps"))
    assert (incident["shape"], safer["shape"], back["shape"]) == ("fault", "safer", "rollback")
    assert (back["step"], back["end"]) == (146, 164)
    assert undone(events) == [[146, 164]]


def test_undone_steps_in_words(tmp_path: Path) -> None:
    once = undone_in_words(traced_events("backward-clamp", tmp_path / "a"))
    assert once.startswith("Hatched: steps 146 to 164 as they were before they were undone; their")
    often = undone_in_words(traced_events("outliers", tmp_path / "b"))
    assert "steps 146 to 168 and 146 to 172 and 173 to 192 and 1 more stretch as" in often
    assert undone_in_words(traced_events("healthy", tmp_path / "c")) == ""


def test_thousands_of_skips_are_few_marks() -> None:
    events: list[Event] = [SkippedStep(step=step, reason="") for step in range(0, 60_000, 7)]
    (lane,) = lanes(events, 60_000)
    assert len(lane["marks"]) <= 250
    assert sum(mark["count"] for mark in lane["marks"]) == len(events)
    row = [SkippedStep(step=step, reason="") for step in range(10, 20)]
    assert len(lanes(row, 100)[0]["marks"]) == 1
