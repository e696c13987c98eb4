"""The format of every layer over time."""

from __future__ import annotations

from pathlib import Path

from lightning_fp.records import Demotion, Event, FormatChange, Promotion
from lightning_fp.records.run import LayerInfo, RunInfo
from lightning_fp.report import RunRecords, read_records
from lightning_fp.report.read.format_history import HIGH, format_histories, layer_groups


def start(step: int, **formats: str) -> RunInfo:
    layers = [
        LayerInfo(name=name, format=format, kernel="", flops_share=None)
        for name, format in formats.items()
    ]
    return RunInfo(step=step, layers=tuple(layers))


def run(starts: list[RunInfo], events: list[Event]) -> RunRecords:
    return RunRecords(path=Path("r"), name="r", starts=tuple(starts), events=tuple(events))


def change(step: int, layer: str, before: str, after: str, **more: str) -> FormatChange:
    return FormatChange(step=step, reason="", formats={layer: (before, after)}, **more)


def test_events_change_the_formats_that_the_run_began_with() -> None:
    events = [
        change(5, "a", "fp8", "bf16"),
        Demotion(step=6, reason="", formats={"b": ("fp8", "bf16")}, action="dry run: nothing"),
        change(9, "a", "bf16", "x"),
        change(9, "a", "x", "fp8"),  # between the same two steps
        Promotion(step=12, reason="", formats={"new": ("x", "y")}),
    ]
    histories = format_histories(run([start(0, a="fp8", b="fp8")], events))
    assert histories["a"] == ((0, "fp8"), (5, "bf16"), (9, "fp8"))
    assert histories["b"] == ((0, "fp8"),)


def test_each_start_says_what_the_formats_are() -> None:
    starts = [start(0, a="fp8"), start(10, a="bf16"), start(20, a="bf16")]
    histories = format_histories(run(starts, [change(15, "a", "bf16", "fp8")]))
    assert histories["a"] == ((0, "fp8"), (10, "bf16"), (15, "fp8"), (20, "bf16"))


def test_without_layers_they_come_from_the_statistics(made_up: Path, tmp_path: Path) -> None:
    (tmp_path / "statistics").symlink_to(made_up / "statistics")
    histories = format_histories(read_records(tmp_path))
    assert len(histories) == 12
    assert set(histories.values()) == {((0, "fp8-delayed"),)}
    assert HIGH not in str(histories)


def test_layers_with_one_course_share_a_row() -> None:
    same, other = ((0, "fp8"),), ((0, "fp8"), (3, "bf16"))
    groups = layer_groups({"a": same, "b": same, "c": other, "d": same})
    assert [group.label for group in groups] == ["a and 1 more", "c", "d"]
    many = {f"l{i}": other if i % 2 else same for i in range(200)}
    assert [len(group.layers) for group in layer_groups(many)] == [100, 100]
    wild = {f"l{i}": ((0, "fp8"), (i + 1, "bf16")) for i in range(300)}
    assert len(layer_groups(wild, most=50)) == 50
