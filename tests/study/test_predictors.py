"""Predictors: what an AUC is, on runs whose truth is known, and the command."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_fp.cli import main
from lightning_fp.records.stability import StabilityWriter
from lightning_fp.study.auc import Comparison, auc, interval
from lightning_fp.study.predictor_runs import StudiedRun, read_runs
from lightning_fp.study.predictors import predictors

STEPS = 60


def made_up(seed: int, failed_at: int | None, draw: random.Random) -> StudiedRun:
    """Sharpness rises 20 steps before a failure, calm falls, noise does nothing, time goes on."""
    end = STEPS if failed_at is None else failed_at

    def course(rise: float) -> dict[int, float]:
        near = range(1, end + 1)
        return {
            s: draw.gauss(0, 1)
            + (0 if failed_at is None else rise * max(0, 20 - (failed_at - s)) / 20)
            for s in near
        }

    signals = {
        "logit_sharpness": course(12),
        "calm": course(-12),
        "noise": course(0),
        "time": {s: float(s) for s in range(1, end + 1)},
    }
    return StudiedRun(name=f"{seed}", seed=seed, failed_at=failed_at, signals=signals)


def made_up_runs(seeds: int = 8) -> list[StudiedRun]:
    draw = random.Random(0)
    return [
        made_up(seed, failed, draw)
        for seed in range(seeds)
        for failed in (None, None, None, draw.randrange(35, 50), draw.randrange(35, 50))
    ]


def test_an_auc_by_hand() -> None:
    one = Comparison(run=0, case=2.0, controls={1: 1.0, 2: 3.0})
    other = Comparison(run=3, case=5.0, controls={1: 5.0, 2: 0.0})
    assert auc([one]) == 0.5
    assert auc([one, other]) == (1 + 1.5) / 4
    assert auc([one], {0: 2, 1: 1, 2: 3}) == 2 / 8
    assert auc([]) is None
    assert interval([], []) == (0.0, 1.0)


def test_the_interval_holds_what_it_says() -> None:
    """95% of intervals over runs drawn anew have the AUC of two normal distributions, one apart."""
    truth = 0.5 * (1 + math.erf(0.5))
    inside = 0
    for trial in range(60):
        draw = random.Random(trial)
        controls = {run: draw.gauss(0, 1) for run in range(20)}
        cases = [
            Comparison(run=20 + i, case=draw.gauss(1, 1), controls=controls) for i in range(20)
        ]
        low, high = interval(cases, range(40), trial)
        inside += low <= truth <= high
    assert inside >= 51  # of 60; 57 are expected, and fewer than 51 happen once in 100 times


def test_what_is_planted_is_found_and_time_tells_nothing() -> None:
    found = predictors(made_up_runs(), (5, 18, 30))
    rows = {(row.signal, row.ahead): row for row in found.rows}
    assert found.failed == 16
    assert rows["logit_sharpness", 5].auc > 0.95
    assert rows["logit_sharpness", 5].direction == "up"
    assert rows["calm", 5].auc > 0.95
    assert rows["calm", 5].direction == "down"
    assert rows["logit_sharpness", 5].low > 0.8
    for name in ("noise", "time"):
        assert rows[name, 5].low <= 0.5 <= rows[name, 5].high
    assert rows["logit_sharpness", 5].auc > rows["logit_sharpness", 18].auc
    assert rows["logit_sharpness", 30].low <= 0.55  # it has not begun to rise
    assert rows["time", 5].auc == 0.5
    assert [row.ahead for row in found.rows] == sorted(row.ahead for row in found.rows)


def test_direction_is_no_gift() -> None:
    """Of pure noise an AUC whose direction was chosen on the same runs would be above 0.5."""
    draw = random.Random(3)
    found = []
    for _ in range(40):
        runs = [
            made_up(seed, failed, draw)
            for seed in range(4)
            for failed in (None, None, draw.randrange(35, 50))
        ]
        row = next(r for r in predictors(runs, (5,)).rows if r.signal == "noise")
        found.append(row.auc)
    assert abs(sum(found) / len(found) - 0.5) < 3 * 0.25 / math.sqrt(len(found))


def test_too_little_is_said() -> None:
    runs = made_up_runs()
    with pytest.raises(ValueError, match="at least two seeds, got 1"):
        predictors([run for run in runs if run.seed == 0])
    with pytest.raises(ValueError, match="of 24 runs 0 failed"):
        predictors([run for run in runs if run.failed_at is None])
    with pytest.raises(ValueError, match="ahead must be at least 1, got 0"):
        predictors(runs, (0,))


# ------------------------------------------------------------------ directories


def write(place: Path, run: StudiedRun) -> None:
    writer = StabilityWriter(place)
    steps = sorted(run.signals["noise"])
    columns: dict[str, Any] = {"step": steps, "lr": [1e-3] * len(steps)}
    columns["loss"] = [3.0 if run.failed_at != s else math.inf for s in steps]
    for name, of in (("logit_sharpness", "logit_sharpness"), ("update_rms", "noise")):
        columns[name] = [run.signals[of][s] for s in steps]
    writer.append(columns)
    writer.flush()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    rows = []
    for index, run in enumerate(made_up_runs(4)):
        name = f"e8m3-{index}"
        write(tmp_path / "cells" / name, run)
        diverged = run.failed_at is not None
        rows.append(
            {
                "id": name,
                "seed": run.seed,
                "diverged": diverged,
                "diverged_step": run.failed_at,
                "error": None,
            }
        )
    rows.append({"id": "lost", "seed": 1, "diverged": None, "diverged_step": None, "error": "x"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cells.parquet")
    return tmp_path


def test_the_command_reads_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read_runs([sweep])) == 20
    assert main(["study", "predictors", str(sweep), "--ahead", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    best = told["rows"][0]
    assert best["signal"] == "logit_sharpness"
    assert best["auc"] > 0.9
    assert told["failed"] == 8
    assert main(["study", "predictors", str(sweep)]) == 0
    screen = capsys.readouterr().out
    assert "5 steps ahead" in screen
    assert "20 steps ahead" in screen
    assert "logit_sharpness" in screen


def test_what_cannot_be_read_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, words in ((tmp_path / "no", "there is no directory"), (tmp_path, "no signals in")):
        assert main(["study", "predictors", str(place)]) != 0
        assert words in capsys.readouterr().err
