"""`lightning-fp study sweep`: whole, killed, beside another worker, and refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_fp.cli import main
from lightning_fp.cli.commands.sweep_speed import predicted
from lightning_fp.demo.presets import tiny
from lightning_fp.recipes import RolloutRecipe
from lightning_fp.records import read_stability
from lightning_fp.study.sweep.factory import CellFactory
from lightning_fp.study.sweep.grid import grid
from lightning_fp.study.sweep.results import read_cells
from lightning_fp.study.sweep.storage.cell_table import CellTable
from lightning_fp.study.sweep.storage.database import SQLite
from lightning_fp.study.sweep.sweep import Sweep

FACTORIES = Path(__file__).parent / "study" / "sweep" / "factories.py"
SMALL = ("--formats", "bf16,e8m3", "--lr", "1e-2,1e-1", "--seeds", "2", "--steps", "20")


def sweep(factory: str, directory: Path, *options: str) -> int:
    return main(["study", "sweep", f"{FACTORIES}:{factory}", "--dir", str(directory), *options])


def command(directory: Path, *options: str) -> list[str]:
    program = [sys.executable, "-W", "ignore", "-m", "lightning_fp", "study", "sweep"]
    return [*program, f"{FACTORIES}:fit", "--dir", str(directory), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def facts(directory: Path) -> list[dict[str, Any]]:
    """All that does not depend on the time."""
    rows = read_cells(directory)
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in rows]


def done(directory: Path) -> set[str]:
    path = directory / "cells.sqlite"
    if not path.exists():
        return set()
    try:
        entries = CellTable(SQLite(path)).entries()
    except Exception:  # not there yet
        return set()
    return {entry.cell.id for entry in entries if entry.state == "done"}


class Outside(HTMLParser):
    """What a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith(("#", "data:")):
                self.found.append(value)


def test_a_sweep_leaves_a_table_a_page_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("fit", tmp_path, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "Runs that failed" in printed
    rows = read_cells(tmp_path)
    assert len(rows) == 8
    assert {(r["format"], r["lr"], r["seed"]) for r in rows} == {
        (f, lr, s) for f in ("bf16", "e8m3") for lr in (1e-2, 1e-1) for s in (0, 1)
    }
    assert all(r["steps"] == 20 and r["seconds"] > 0 and not r["diverged"] for r in rows)
    for row in rows:
        assert (tmp_path / "cells" / row["id"] / "loss.csv").is_file()
        assert (tmp_path / "cells" / row["id"] / "run.jsonl").is_file()
    assert main(["report", str(tmp_path / "cells" / rows[0]["id"])]) == 0
    page = Outside()
    page.feed((tmp_path / "sweep.html").read_text())
    assert page.found == []

    # the same command again has nothing to do, and says the same
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").rglob("*.csv")}
    capsys.readouterr()
    assert sweep("fit", tmp_path, *SMALL) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").rglob("*.csv")} == before

    # further seeds are added to what is there
    capsys.readouterr()
    assert sweep("fit", tmp_path, *SMALL, "--seeds", "3", "--json") == 0
    assert len(read_cells(tmp_path)) == 12
    found = json.loads(capsys.readouterr().out)
    assert [each["runs"] for each in found["formats"]] == [6, 6]


def test_same_seed_same_result(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert sweep("fit", tmp_path / name, *SMALL) == 0
    assert facts(tmp_path / "a") == facts(tmp_path / "b")


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert sweep("fit", whole, *SMALL) == 0
    killed = tmp_path / "killed"
    finished: dict[str, int] = {}
    for kills in range(3):
        process = subprocess.Popen(
            command(killed, *SMALL),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        # in the first cell, and then one or two later
        while len(done(killed)) < 2 * kills and time.monotonic() < deadline:
            time.sleep(0.005)
        while not any((killed / "workers").glob("*.lock")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        files = (killed / "cells").rglob("loss.csv")
        now = {path.parent.name: path.stat().st_mtime_ns for path in files}
        finished |= {id: now[id] for id in done(killed)}
    assert sweep("fit", killed, *SMALL) == 0
    times = {id: (killed / "cells" / id / "loss.csv").stat().st_mtime_ns for id in finished}
    assert times == finished, "a cell that was done has run again"
    assert len(finished) < 8
    assert facts(killed) == facts(whole)


@pytest.mark.slow
def test_two_workers_share_one_sweep(tmp_path: Path) -> None:
    options = (*SMALL, "--seeds", "4")
    both = [
        subprocess.Popen(
            command(tmp_path, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(read_cells(tmp_path)) == 16
    ids = {row["id"] for row in read_cells(tmp_path)}
    words = [word.rstrip(":") for output in outputs for word in output.split()]
    ran = [word for word in words if word in ids]
    assert sorted(ran) == sorted(ids)


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        ("nowhere", (), "has no 'nowhere'"),
        ("no_rate", (), "must take lr, the learning rate, as a parameter; it takes nothing"),
        ("raises", (), "raised RuntimeError: no such data"),
        ("same_model", (), "gives the same layers.0.weight in two calls"),
        ("own_generator", (), "gives other weights in a second call with seed 0"),
        ("used_up", (), "gives another first batch in a second call"),
        ("remembers", (), "training leaves something behind"),
        ("fit", ("--formats", "bf16,nvfp4"), "nvfp4 does not run on this machine"),
        ("fit", ("--formats", "bf17"), "bf17"),
        ("fit", ("--axis", "heads=2,4"), "neither the sweep nor"),
        ("fit", ("--axis", "width=8,x"), "raised TypeError"),
        ("fit", ("--axis", "fallback=maybe"), "--axis fallback must be on or off, got 'maybe'"),
        ("fit", ("--axis", "clip=-1"), "--axis clip must be a finite number of at least 0"),
        ("fit", ("--axis", "recipe=balancd"), "did you mean 'balanced'"),
        ("fit", ("--axis", "base=17"), "--axis base: "),
        ("fit", ("--axis", "attention=mx"), "--axis attention: attention must be a simulated one"),
        ("fit", ("--axis", "attention=on"), "--axis attention must be a simulated format"),
        ("fit", ("--formats", "fp16", "--axis", "attention=e8m2"), "off with fp16 among"),
        ("fit", ("--formats", "e8m3", "--emit", "r.yaml"), "--emit needs bf16"),
        ("fit", ("--emit", "/dev/null/r.yaml"), "--emit /dev/null/r.yaml: "),
        ("fit", ("--lr", "a"), "--lr must be numbers"),
        ("fit", ("--seeds", "0"), "--seeds must be at least 1"),
        ("fit", ("--steps", "2"), "--steps must be at least 10"),
    ],
)
def test_what_cannot_be_is_one_line(
    factory: str,
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sweep(factory, tmp_path, *SMALL, *options) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len([line for line in error.splitlines() if "lightning-fp study" in line]) == 1
    assert "Traceback" not in error


def test_neither_and_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "sweep", "--dir", str(tmp_path)]) == 2
    assert sweep("fit", tmp_path, "--preset", "tiny") == 2
    assert main(["study", "sweep", "--preset", "tinny", "--dir", str(tmp_path)]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err


def test_another_sweep_is_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("fit", tmp_path, *SMALL, "--seeds", "1") == 0
    assert sweep("fit", tmp_path, *SMALL, "--steps", "30") == 2
    assert "steps 20, not 30" in capsys.readouterr().err
    assert len(read_cells(tmp_path)) == 4


def test_cells_that_break_are_told_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("breaks", tmp_path, *SMALL) == 1
    error = capsys.readouterr().err
    assert "bf16-lr0.1-seed0 could not run: RuntimeError: out of something" in error
    rows = read_cells(tmp_path)
    assert len(rows) == 8
    assert {row["lr"] for row in rows if row["error"]} == {0.1}


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    assert sweep("fit", tmp_path, *SMALL, "--seeds", "1") == 0
    full = (tmp_path / "cells.sqlite").stat().st_size  # no file may grow beyond it

    def bounded() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))

    options = (*SMALL, "--seeds", "200")
    ended = subprocess.run(
        command(tmp_path, *options),
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=bounded,
        timeout=200,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert str(tmp_path) in line
    assert len(done(tmp_path)) == 4
    assert sweep("fit", tmp_path, *SMALL) == 0
    assert len(read_cells(tmp_path)) == 8


def test_cost_and_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipes" / "mine.yaml"
    options = ("--formats", "bf16,fp8-dynamic,fp8-delayed", "--lr", "1e-2", "--seeds", "2")
    options = (*options, "--steps", "20", "--speedup", "1.25", "--emit", str(recipe))
    assert sweep("fit", tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "fp8-dynamic pays above 1.00x raw speed-up on this model" in printed
    assert "at 1.25x a run costs 0.80 of bf16's" in printed
    assert "about 200 billion tokens" in printed
    assert "pays above 1.00x" in (tmp_path / "sweep.html").read_text()
    assert main(["recipes", "check", str(recipe)]) == 0
    assert RolloutRecipe.from_yaml(recipe).evidence[0].passed
    capsys.readouterr()
    assert sweep("fit", tmp_path, *options, "--json") == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert [cost["cost_at_speedup"] for cost in costs] == [0.8, 0.8]
    assert sweep("fit", tmp_path, *options, "--speedup", "0") == 2
    assert sweep("fit", tmp_path, *options, "--hardware", "h100") == 2  # and --speedup
    without = (*options[:-4], *options[-2:])
    capsys.readouterr()
    assert sweep("fit", tmp_path, *without, "--hardware", "h100", "--json") == 0
    costs = json.loads(capsys.readouterr().out)["costs"]
    assert [cost["cost_at_speedup"] for cost in costs] == [None, None], "no forward to predict by"


def test_the_speed_that_a_plan_predicts(tmp_path: Path) -> None:
    cells = grid(["bf16", "e8m3", "fp8-dynamic", "mxfp8"], [1e-3], [0], {})
    maker = CellFactory("preset tiny", tiny)
    small = Sweep(factory=maker, cells=cells, steps=10, directory=tmp_path)
    speed = predicted(small, "h100")
    assert speed["bf16"] is speed["e8m3"] is None
    assert 0.1 < (speed["fp8-dynamic"] or 0) < 1, "a card waits most of the time for a tiny model"


def test_axes_of_the_sweep_and_of_the_factory(tmp_path: Path) -> None:
    axes = ("--axis", "width=16,48", "--axis", "clip=0.1", "--axis", "fallback=on,off")
    options = ("--formats", "fp8-delayed", "--lr", "1e-2", "--seeds", "1", "--steps", "20")
    assert sweep("fit", tmp_path, *options, *axes) == 0
    rows = read_cells(tmp_path)
    assert {(r["width"], r["clip"], r["fallback"]) for r in rows} == {
        (width, "0.1", fallback) for width in ("16", "48") for fallback in ("on", "off")
    }


def test_attention_is_an_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--formats", "bf16", "--lr", "1e-3", "--seeds", "1", "--steps", "10")
    attention = ("--axis", "attention=off,e8m2")
    preset = ["study", "sweep", "--preset", "tiny", "--dir", str(tmp_path / "gpt")]
    assert main([*preset, *options, *attention]) == 0
    rows = {row["attention"]: row for row in read_cells(tmp_path / "gpt")}
    assert rows["off"]["curve"] != rows["e8m2"]["curve"]
    page = next((tmp_path / "gpt").glob("*.html")).read_text()
    assert "attention e8m2" in page
    assert sweep("fit", tmp_path / "mlp", *options, *attention) == 1
    assert "attention was to be in e8m2 and never was" in capsys.readouterr().err


def test_a_rollout_has_what_its_gates_ask_for(tmp_path: Path) -> None:
    options = ("--formats", "bf16,fp8-dynamic", "--lr", "1e-2", "--seeds", "1", "--steps", "20")
    assert sweep("fit", tmp_path, *options, "--axis", "recipe=off,balanced") == 0
    rows = {(row["format"], row["recipe"]): row for row in read_cells(tmp_path)}
    assert len(rows) == 4
    assert rows["bf16", "off"]["curve"] == rows["bf16", "balanced"]["curve"]
    assert rows["fp8-dynamic", "off"]["curve"] != rows["fp8-dynamic", "balanced"]["curve"]


def test_signals_are_recorded_for_the_predictors(tmp_path: Path) -> None:
    options = ("--formats", "bf16", "--lr", "1e-2", "--seeds", "1", "--steps", "20")
    assert sweep("fit", tmp_path, *options, "--axis", "signals=on") == 0
    (row,) = read_cells(tmp_path)
    assert len(read_stability(tmp_path / "cells" / row["id"])) > 0
