"""The event log: what is written is read, whatever happened in between."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp.records import Demotion, Event, EventWriter, Note, read_events
from lightning_fp.records.events import (
    FILE,
    KINDS,
    FormatChange,
    LayerClimb,
    OtherEvent,
    Promotion,
    Replayed,
    Resumed,
    Rollback,
    SkippedStep,
    StageChange,
    Started,
    StateChange,
    Suspicion,
    Verdict,
)

text = st.text(max_size=20)
number = st.floats() | st.integers(-(2**60), 2**60)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "step": st.integers(0, 2**40),
    "reason": text,
    "numbers": st.dictionaries(text, number, max_size=4),
    "layers": st.lists(text, max_size=4).map(tuple),
    "action": text,
    "time": st.floats(0, 2**34),
    "formats": st.dictionaries(text, st.tuples(text, text), max_size=4),
    "verdict": st.sampled_from(["precision", "not precision", "unclear"]),
    "tier": st.sampled_from(["one step", "trajectory"]),
    "to_step": st.integers(0, 2**40),
    "replayed": st.integers(0, 2**20),
    "before": text,
    "after": text,
    "stage": text,
    "previous": text,
    "statistic": text,
    "passed": st.booleans(),
    "outcome": st.sampled_from(["passed", "one step", "limits only"]),
    "differs": st.lists(text, max_size=4).map(tuple),
    "put_back": st.lists(text, max_size=4).map(tuple),
    "not_looked_at": st.lists(text, max_size=4).map(tuple),
}


def any_event(of: type[Event]) -> st.SearchStrategy[Event]:
    return st.builds(of, **{f.name: FIELDS[f.name] for f in dataclasses.fields(of)})


WRITTEN = [of for of in KINDS.values() if of is not Resumed]  # which the writer writes itself
events = st.sampled_from(WRITTEN).flatmap(any_event)


def comparable(event: Event) -> tuple[type[Event], dict[str, Any]]:
    """With NaN equal to itself."""
    numbers = {name: repr(float(value)) for name, value in event.numbers.items()}
    return type(event), {**dataclasses.asdict(event), "numbers": numbers}


def note(step: int, reason: str = "because") -> Note:
    return Note(step=step, reason=reason)


def reasons(run_dir: Path) -> list[str]:
    return [event.reason for event in read_events(run_dir) if not isinstance(event, Resumed)]


class TestRoundTrip:
    @given(st.lists(events, max_size=8))
    @settings(max_examples=100, deadline=None)
    def test_any_events(
        self, tmp_path_factory: pytest.TempPathFactory, written: list[Event]
    ) -> None:
        run_dir = tmp_path_factory.mktemp("run")
        writer = EventWriter(run_dir)
        writer.append(note(0))
        for event in written:
            writer.append(event)
        read = read_events(run_dir)
        assert [comparable(event) for event in read[1:]] == [comparable(e) for e in written]
        for line in (run_dir / FILE).read_bytes().splitlines():
            json.loads(line, parse_constant=_refuse)
        for event in read:
            assert event.sentence().startswith(f"step {event.step}: {event.kind}")
            assert "\n" not in event.sentence()

    def test_every_kind_is_there(self) -> None:
        subclasses = {Event}
        while True:
            more = subclasses | {sub for of in subclasses for sub in of.__subclasses__()}
            if more == subclasses:
                break
            subclasses = more
        assert subclasses - {Event, OtherEvent} == set(KINDS.values())
        assert all(of.kind == kind for kind, of in KINDS.items())

    def test_not_finite(self, tmp_path: Path) -> None:
        numbers = {"loss": math.inf, "before": -math.inf, "grad_norm": math.nan, "lr": 1e-4}
        EventWriter(tmp_path).append(Suspicion(step=3, reason="r", numbers=numbers))
        (event,) = read_events(tmp_path)
        assert event.numbers["loss"] == math.inf
        assert event.numbers["before"] == -math.inf
        assert math.isnan(event.numbers["grad_norm"])
        assert event.numbers["lr"] == 1e-4

    def test_time_is_now(self) -> None:
        assert abs(note(1).time - time.time()) < 60

    def test_kinds(self, tmp_path: Path) -> None:
        writer = EventWriter(tmp_path)
        writer.append(note(1))
        writer.append(SkippedStep(step=2, reason="r"))
        writer.append(StateChange(step=3, reason="r", before="HEALTHY", after="SUSPECT"))
        assert [e.step for e in read_events(tmp_path, kinds=["note", "state"])] == [1, 3]
        assert read_events(tmp_path, kinds=[]) == []
        with pytest.raises(ValueError, match=r"kinds must be among .*'demote'.*got \['demotion'\]"):
            read_events(tmp_path, kinds=["demotion"])

    def test_no_log(self, tmp_path: Path) -> None:
        for nowhere in (tmp_path, tmp_path / "not there"):
            with pytest.raises(FileNotFoundError, match="run_dir must be a directory that"):
                read_events(nowhere)

    def test_a_writer_alone_writes_nothing(self, tmp_path: Path) -> None:
        assert EventWriter(tmp_path / "a" / "b").position == 0
        assert not (tmp_path / "a" / "b" / FILE).exists()


class TestSentences:
    @pytest.mark.parametrize(
        ("event", "sentence"),
        [
            (
                Demotion(step=152, reason="why.", formats={"b.1.fc2": ("fp8-delayed", "bf16")}),
                "step 152: demote b.1.fc2 fp8-delayed -> bf16: why",
            ),
            (
                LayerClimb(
                    step=9,
                    reason="clamped mass 0.2 > 0.01",
                    formats={**{c: ("a", "b") for c in "vwxyz"}, "q": ("b", "c")},
                ),
                "step 9: limit v, w, x and 2 more a -> b, q b -> c: clamped mass 0.2 > 0.01",
            ),
            (
                Promotion(step=9, reason="", formats={"q": ("bf16", "fp8-dynamic")}),
                "step 9: promote q bf16 -> fp8-dynamic",
            ),
            (
                FormatChange(step=9, reason="asked for", formats={"q": ("bf16", "fp16")}),
                "step 9: format q bf16 -> fp16: asked for",
            ),
            (
                Suspicion(step=5, reason="two\nlines.", action="replay at once", layers=("q",)),
                "step 5: suspect q: two lines; replay at once",
            ),
            (
                Verdict(step=5, reason="r", verdict="not precision", tier="trajectory"),
                "step 5: verdict not precision (trajectory): r",
            ),
            (
                Replayed(step=5, reason="r", numbers={"loss": 2.123456, "noise": math.nan}),
                "step 5: replay loss 2.123, noise nan: r",
            ),
            (
                Rollback(step=160, reason="r", to_step=144, replayed=15),
                "step 160: rollback to step 144, 15 steps trained again, 1 lost: r",
            ),
            (
                StateChange(step=5, reason="r", before="SUSPECT", after="HEALTHY"),
                "step 5: state SUSPECT -> HEALTHY: r",
            ),
            (
                StageChange(step=5, reason="r", previous="bf16", stage="middle"),
                "step 5: stage bf16 -> middle: r",
            ),
            (Started(step=0, reason="armed"), "step 0: started: armed"),
        ],
    )
    def test_console_line(self, event: Event, sentence: str) -> None:
        assert event.sentence() == sentence

    def test_changes_name_their_layers(self) -> None:
        event = Demotion(step=1, reason="", formats={"a": ("x", "y"), "b": ("x", "y")})
        assert event.layers == ("a", "b")


class TestOtherVersions:
    def line(self, **changes: Any) -> bytes:
        line = {"step": 4, "reason": "r", "numbers": {}, "layers": ["a"], "action": "", "time": 1.0}
        return json.dumps({**line, **changes}).encode() + b"\n"

    def test_kind_from_the_future(self, tmp_path: Path) -> None:
        (tmp_path / FILE).write_bytes(self.line(kind="teleport", distance=3, numbers={"a": "inf"}))
        (event,) = read_events(tmp_path)
        assert isinstance(event, OtherEvent)
        assert (event.kind, event.step, event.numbers) == ("teleport", 4, {"a": math.inf})
        assert event.sentence() == "step 4: teleport a: r"

    def test_fields_from_the_future(self, tmp_path: Path) -> None:
        (tmp_path / FILE).write_bytes(self.line(kind="note", colour="red"))
        assert read_events(tmp_path) == [Note(step=4, reason="r", layers=("a",), time=1.0)]

    def test_fields_gone_in_the_future(self, tmp_path: Path) -> None:
        (tmp_path / FILE).write_bytes(self.line(kind="verdict", verdict="precision"))
        (event,) = read_events(tmp_path)
        assert (type(event), event.kind) == (OtherEvent, "verdict")


class TestCutShort:
    @pytest.mark.parametrize("resume", [False, True])
    def test_at_every_byte(
        self, tmp_path: Path, resume: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = EventWriter(tmp_path / "whole")
        for step in range(3):
            whole.append(note(step, f"reason {step}"))
        content = whole.path.read_bytes()
        complete = content.count(b"\n", 0, len(content) - 1)
        for length in range(content.rindex(b"\n", 0, -1) + 1, len(content)):
            run_dir = tmp_path / str(length)
            run_dir.mkdir()
            (run_dir / FILE).write_bytes(content[:length])
            assert reasons(run_dir) == ["reason 0", "reason 1"]
            if resume:
                EventWriter(run_dir, step=1).append(note(5, "after"))
                assert reasons(run_dir) == ["reason 0", "reason 1", "after"]
        assert complete == 2

    def test_every_line_after_a_cut_one_counts(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        writer = EventWriter(tmp_path)
        writer.append(note(1, "one"))
        with writer.path.open("ab") as file:  # the disk was full
            file.write(b'{"kind": "no')
        writer.append(note(2, "two"))
        assert reasons(tmp_path) == ["one", "two"]
        assert "is left out" in caplog.text

    def test_killed(self, tmp_path: Path) -> None:
        """What was appended before the kill is read, in order and whole, and the run goes on."""
        code = """
            import itertools, sys
            from lightning_fp.records import Demotion, EventWriter
            writer = EventWriter(sys.argv[1])
            for step in itertools.count():
                formats = {f"blocks.{i}.fc2": ("fp8-delayed", "bf16") for i in range(40)}
                writer.append(Demotion(step=step, reason="x" * (step % 5000), formats=formats))
                print(step, flush=True)
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = [next(process.stdout) for _ in range(200)]
        while_running = read_events(tmp_path)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert [event.step for event in while_running] == list(range(len(while_running)))
        assert len(while_running) >= 200
        last = int(said[-1])
        read = read_events(tmp_path)
        assert [event.step for event in read] == list(range(len(read)))
        assert len(read) in (last + 1, last + 2)
        EventWriter(tmp_path, step=10).append(note(11))
        read = read_events(tmp_path)
        assert [event.step for event in read] == [*range(11), 10, 11]


class TestResume:
    def test_later_events_of_an_abandoned_continuation_are_void(self, tmp_path: Path) -> None:
        writer = EventWriter(tmp_path)
        for step in (5, 10, 15):
            writer.append(note(step, f"first {step}"))
        resumed = EventWriter(tmp_path, step=10)
        assert reasons(tmp_path) == ["first 5", "first 10"]
        resumed.append(note(12, "second 12"))
        assert reasons(tmp_path) == ["first 5", "first 10", "second 12"]
        (marker,) = read_events(tmp_path, kinds=["resumed"])
        assert (marker.step, type(marker)) == (10, Resumed)

    def test_position_decides_about_the_step_itself(self, tmp_path: Path) -> None:
        writer = EventWriter(tmp_path)
        writer.append(note(10, "in the checkpoint"))
        position = writer.position
        writer.append(note(10, "after the checkpoint"))
        EventWriter(tmp_path, step=10, position=position).append(note(10, "again"))
        assert reasons(tmp_path) == ["in the checkpoint", "again"]

    def test_position_of_another_file(self, tmp_path: Path) -> None:
        EventWriter(tmp_path).append(note(10, "ten"))
        EventWriter(tmp_path, step=10, position=10**9).append(note(11, "eleven"))
        assert reasons(tmp_path) == ["ten", "eleven"]

    @given(
        st.lists(
            st.tuples(st.integers(1, 4), st.integers(0, 10)),  # events written, where to resume
            min_size=1,
            max_size=6,
        )
    )
    @settings(max_examples=60, deadline=None)
    def test_any_branches(
        self, tmp_path_factory: pytest.TempPathFactory, branches: list[tuple[int, int]]
    ) -> None:
        """Checkpoints after every event; each continuation begins at any of them."""
        run_dir = tmp_path_factory.mktemp("run")
        writer = EventWriter(run_dir)
        checkpoints: list[tuple[int, list[str]]] = []
        history: list[str] = []
        for branch, (count, choice) in enumerate(branches):
            if checkpoints:
                position, history = checkpoints[choice % len(checkpoints)]
                writer = EventWriter(run_dir, step=len(history), position=position)
            for index in range(count):
                event = note(len(history) // 2, f"{branch}.{index}")
                writer.append(event)
                history = [*history, event.reason]
                checkpoints.append((writer.position, history))
            assert reasons(run_dir) == history


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
