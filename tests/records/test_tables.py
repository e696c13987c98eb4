"""Parquet parts: what is written is read, whatever happened in between."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lightning_fp.records import StatisticsWriter, read_statistics, tables
from lightning_fp.records.tables import SCHEMA


def row(step: int, value: float = 0.0, layer: str = "a") -> dict[str, Any]:
    return {
        "step": [step],
        "layer": [layer],
        "operand": ["input"],
        "format": ["fp8-delayed"],
        "clamped_mass": [value],
        "nonfinite": [float("nan")],
    }


def steps(run_dir: Path) -> list[int]:
    return read_statistics(run_dir)["step"].to_pylist()


def parts(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "statistics").iterdir())


class TestRoundTrip:
    def test_rows(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path)
        writer.append(row(1, 0.5))
        writer.append(row(2, 0.25, "b"))
        writer.flush()
        table = read_statistics(tmp_path)
        assert table.schema.equals(SCHEMA)
        assert table["layer"].to_pylist() == ["a", "b"]
        assert table["clamped_mass"].to_pylist() == [0.5, 0.25]
        assert table["nonfinite"].to_pylist() == [None, None]
        assert table["amax"].null_count == 2

    def test_columns_and_filters(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path)
        for step in range(4):
            writer.append(row(step, layer="ab"[step % 2]))
        writer.flush()
        table = read_statistics(tmp_path, columns=["step"], filters=pc.field("layer") == "b")
        assert table.to_pydict() == {"step": [1, 3]}

    def test_infinity_stays(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path)
        writer.append(row(1, float("inf")))
        writer.flush()
        assert read_statistics(tmp_path)["clamped_mass"].to_pylist() == [float("inf")]

    def test_a_run_from_before_a_column(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path)
        writer.append(row(1))
        writer.flush()
        more = {"sampled": [True], "sampled_at": ["1 2"]}
        writer.append({**row(2), **more, "what_if_block_underflow_fraction": [0.5]})
        writer.append({**row(3), "sampled": [False], "sampled_at": [""]})
        writer.flush()
        table = read_statistics(tmp_path)
        assert table.column_names == SCHEMA.names
        assert table["what_if_block_underflow_fraction"].to_pylist() == [None, 0.5, None]
        assert table["sampled"].to_pylist() == [None, True, False]
        assert table["sampled_at"].to_pylist() == [None, "1 2", ""]
        old = read_statistics(tmp_path, columns=["scale_spread_bits"])
        assert old["scale_spread_bits"].to_pylist() == [None, None, None]

    def test_nothing_written(self, tmp_path: Path) -> None:
        StatisticsWriter(tmp_path).flush()
        assert read_statistics(tmp_path).num_rows == 0
        with pytest.raises(FileNotFoundError, match="ClampMonitor"):
            read_statistics(tmp_path / "nowhere")


class TestParts:
    def test_rows_are_held_back(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path, rows_per_part=3)
        for step in range(7):
            writer.append(row(step))
        assert steps(tmp_path) == list(range(6))
        writer.flush()
        assert steps(tmp_path) == list(range(7))

    def test_but_not_for_long(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path, seconds=0.0)
        writer.append(row(1))
        assert steps(tmp_path) == [1]

    def test_are_merged(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path, rows_per_part=1)
        for step in range(200):
            writer.append(row(step))
        assert steps(tmp_path) == list(range(200))
        assert parts(tmp_path) == [f"part-{n:06d}.parquet" for n in (0, 64, 128, 192)]

    def test_large_ones_are_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "_LARGEST", 10)
        writer = StatisticsWriter(tmp_path, rows_per_part=1)
        for step in range(32):
            writer.append(row(step))
        assert len(parts(tmp_path)) == 4
        assert steps(tmp_path) == list(range(32))

    def test_merged_ones_that_were_not_removed_are_not_read_twice(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path, rows_per_part=1)
        for step in range(7):
            writer.append(row(step))
        left = {path: path.read_bytes() for path in (tmp_path / "statistics").iterdir()}
        writer.append(row(7))
        for path, content in left.items():
            if not path.name.endswith("000000.parquet"):
                path.write_bytes(content)
        assert len(parts(tmp_path)) == 7
        assert steps(tmp_path) == list(range(8))

    def test_leftovers_of_a_crash(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        writer = StatisticsWriter(tmp_path)
        writer.append(row(1))
        writer.flush()
        (tmp_path / "statistics" / ".part-000001.parquet.tmp").write_bytes(b"PAR1 half of it")
        assert steps(tmp_path) == [1]
        (tmp_path / "statistics" / "part-000005.parquet").write_bytes(b"PAR1 lost by the disk")
        assert steps(tmp_path) == [1]
        assert "part-000005.parquet cannot be read" in caplog.text
        writer = StatisticsWriter(tmp_path, step=1)
        writer.append(row(2))
        writer.flush()
        assert steps(tmp_path) == [1, 2]
        assert parts(tmp_path)[-1] == "part-000006.parquet"  # nothing is overwritten

    def test_a_reader_sees_each_row_once_while_parts_are_merged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer = StatisticsWriter(tmp_path, rows_per_part=1)
        for step in range(7):
            writer.append(row(step))
        read = pq.read_table
        merged = False

        def read_table(path: Path, **options: Any) -> Any:
            nonlocal merged
            if not merged:
                merged = True
                writer.append(row(7))
            return read(path, **options)

        monkeypatch.setattr(tables.pq, "read_table", read_table)
        assert steps(tmp_path) == list(range(8))


class TestResume:
    def test_replaces_an_abandoned_future(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path)
        for step in (50, 100, 150):
            writer.append(row(step, 1.0))
        writer.flush()
        resumed = StatisticsWriter(tmp_path, step=100)
        assert steps(tmp_path) == [50, 100, 150]  # until it has written something
        resumed.append(row(120, 2.0))
        resumed.flush()
        assert steps(tmp_path) == [50, 100, 120]
        again = StatisticsWriter(tmp_path, step=60)
        again.append(row(70, 3.0))
        again.flush()
        table = read_statistics(tmp_path)
        assert table["step"].to_pylist() == [50, 70]
        assert table["clamped_mass"].to_pylist() == [1.0, 3.0]

    def test_a_new_run_in_the_same_directory(self, tmp_path: Path) -> None:
        for step in (10, 5):
            writer = StatisticsWriter(tmp_path)
            writer.append(row(step))
            writer.flush()
        assert steps(tmp_path) == [5]

    def test_rollback_within_a_run(self, tmp_path: Path) -> None:
        writer = StatisticsWriter(tmp_path)
        for step in (10, 20, 30):
            writer.append(row(step))
        writer.rewind(20)
        writer.append(row(25))
        writer.flush()
        assert steps(tmp_path) == [10, 20, 25]

    def test_other_columns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A directory that an earlier version of the package began."""
        with monkeypatch.context() as patch:
            patch.setattr(tables, "SCHEMA", SCHEMA.remove(SCHEMA.get_field_index("clamped_mass")))
            writer = StatisticsWriter(tmp_path)
            writer.append(row(1, 1.0))
            writer.flush()
        writer = StatisticsWriter(tmp_path, step=1)
        writer.append(row(2, 2.0))
        writer.flush()
        assert read_statistics(tmp_path)["clamped_mass"].to_pylist() == [None, 2.0]
        assert read_statistics(tmp_path, columns=["clamped_mass"]).num_rows == 2


def test_readable_after_kill(tmp_path: Path) -> None:
    program = f"""
        from lightning_fp.records import StatisticsWriter
        writer = StatisticsWriter({str(tmp_path)!r}, rows_per_part=2)
        step = 0
        while True:
            step += 1
            writer.append({{"step": [step], "layer": ["a"], "clamped_mass": [0.0]}})
            if step == 101:
                print("go", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        while_running = steps(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    after = steps(tmp_path)
    assert after == list(range(1, len(after) + 1))
    assert 100 <= len(while_running) <= len(after)
