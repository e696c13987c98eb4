"""Whatever became of a run's records: they are read, or one line names the file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_fp.cli import main
from lightning_fp.records import (
    EvaluationRow,
    EvaluationWriter,
    MismatchWriter,
    StabilityWriter,
    read_baseline,
    read_evaluation,
    read_events,
    read_loss,
    read_mismatch,
    read_mismatch_causes,
    read_parity,
    read_run,
    read_stability,
    read_statistics,
    read_steps,
)
from lightning_fp.records.gradients import (
    GradientRow,
    GradientShares,
    append_gradients,
    read_gradients,
)
from lightning_fp.records.parity import append_parity
from lightning_fp.report import read_records, write_report
from tests.report.large_run import write_large_run

READERS: tuple[Callable[[Path], Any], ...] = (
    read_baseline,
    read_evaluation,
    read_events,
    read_gradients,
    read_loss,
    read_mismatch,
    read_mismatch_causes,
    read_parity,
    read_run,
    read_stability,
    read_statistics,
    read_steps,
    read_records,
)

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one of each kind of record."""
    run = write_large_run(tmp_path_factory.mktemp("hard") / "run", layers=3, intervals=4)
    EvaluationWriter(run).append(EvaluationRow(step=8, loss=2.0, loss_high=1.9))
    mismatch = MismatchWriter(run)
    mismatch.append(3, {"k3_kl": 1e-3, "abs_diff": 0.1})
    mismatch.append_causes(3, {"precision": 0.9, "sampling": 0.1})
    stability = StabilityWriter(run)
    stability.append({"step": [1, 2], "loss": [2.0, 1.9], "grad_norm": [1.0, 1.0]})
    stability.flush()
    shares = {"": GradientShares(zero=0.1, subnormal=0.0, overflow=0.0)}
    append_gradients(run, GradientRow(step=4, scale=1024.0, layers=shares))
    layer = {"layer": "a", "format": "fp8-delayed", "cosine": 0.99, "norm_ratio": 1.0}
    append_parity(run, {"step": 10, "loss": 2.0, "loss_gap": 1e-3, "layers": [layer]})
    return run


def files(run: Path) -> list[Path]:
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 100) | st.sampled_from([2**63, 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 3) | st.none(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3) | st.none(), max_size=2),
)


@st.composite
def damage(draw: st.DrawFn) -> tuple[int, Callable[[bytes], bytes]]:
    """Which file, and what becomes of its bytes."""
    at, length = draw(st.floats(0, 1)), draw(st.integers(0, 40))
    kind = draw(st.sampled_from(["cut", "bytes", "zeros", "other", "twice", "line", "cell"]))
    new = draw(st.binary(max_size=12))
    value, key = draw(values), draw(st.floats(0, 0.999))

    def change(content: bytes) -> bytes:
        place = int(at * len(content))
        if kind == "cut":
            return content[:place]
        if kind == "bytes":
            return content[:place] + new + content[place + length :]
        if kind == "zeros":  # as file systems leave them after a power cut
            return content[:place] + bytes(len(content) - place)
        if kind == "twice":
            return content + content[:place]
        if kind == "other":
            return new
        lines = content.split(b"\n")
        row = int(at * (len(lines) - 1))
        lines[row] = (
            _line(lines[row], key, value) if kind == "line" else _cell(lines[row], key, value)
        )
        return b"\n".join(lines)

    return draw(st.integers(0, 100)), change


def _line(line: bytes, key: float, value: Any) -> bytes:
    """One field of a line of JSON has another value."""
    try:
        fields = json.loads(line)
        name = list(fields)[int(key * len(fields))]
    except (ValueError, TypeError, IndexError):
        return line
    return json.dumps({**fields, name: value}).encode()


def _cell(line: bytes, key: float, value: Any) -> bytes:
    """One cell of a line of CSV."""
    cells = line.split(b",")
    cells[int(key * len(cells))] = str(value)[:30].encode()
    return b",".join(cells)


def check(read: Callable[[Path], Any], run: Path) -> None:
    try:
        read(run)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert "\n" not in said, said
        assert str(run) in said, said


def damaged(whole: Path, to: Path, what: tuple[int, Callable[[bytes], bytes]]) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(whole, to)
    number, change = what
    paths = files(to)
    path = to / paths[number % len(paths)]
    path.write_bytes(change(path.read_bytes()))
    return to


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@settings(QUIET, max_examples=15)
@given(what=damage())
def test_damaged_records(what: Any, whole: Path, tmp_path: Path) -> None:
    run = damaged(whole, tmp_path / "run", what)
    for read in READERS:
        check(read, run)


@pytest.mark.slow
@settings(QUIET, max_examples=1000)
@given(what=damage())
def test_a_thousand_damaged_records(what: Any, whole: Path, tmp_path: Path) -> None:
    run = damaged(whole, tmp_path / "run", what)
    for read in READERS:
        check(read, run)


def report_of(run: Path) -> None:
    check(lambda run: write_report([run], run / "report.html"), run)
    for command in ("report", "stats"):
        assert main([command, str(run)]) in (0, 2)


@settings(QUIET, max_examples=3)
@given(what=damage())
def test_reports_of_damaged_records(
    what: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_of(damaged(whole, tmp_path / "run", what))
    capsys.readouterr()


@pytest.mark.slow
@settings(QUIET, max_examples=200)
@given(what=damage())
def test_hundreds_of_reports_of_damaged_records(
    what: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_of(damaged(whole, tmp_path / "run", what))
    capsys.readouterr()


def test_a_directory_where_a_file_should_be(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files(whole):
        run = tmp_path / str(name).replace("/", "-")
        shutil.copytree(whole, run)
        (run / name).unlink()
        (run / name).mkdir()
        for read in READERS:
            check(read, run)
    assert main(["report", str(run)]) == 0


def test_every_file_cut_at_every_quarter(whole: Path, tmp_path: Path) -> None:
    for number, _ in enumerate(files(whole)):
        for quarter in range(4):
            cut = (number, lambda content, q=quarter: content[: q * len(content) // 4])
            run = damaged(whole, tmp_path / "run", cut)
            for read in READERS:
                check(read, run)


def test_records_of_a_later_version(whole: Path, tmp_path: Path) -> None:
    """More fields, another kind of event, more columns: what is known is read."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("events.jsonl", "run.jsonl", "parity.jsonl", "gradients.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        later = [{**line, "colour": {"of": "later"}} for line in lines]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in later))
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({**json.loads(json.dumps(lines[0])), "kind": "teleport"}) + "\n")
    before, after = read_records(whole), read_records(run)
    assert len(after.starts) == len(before.starts) == 1
    assert len(after.parity) == len(before.parity) == 1
    assert len(after.gradients) == len(before.gradients) == 1
    assert [e.kind for e in after.events][: len(before.events)] == [e.kind for e in before.events]
    assert after.unreadable == ()
