"""The fast half of the tests under other versions of Python, torch and Lightning: `make matrix`.

Each cell differs from the tested versions in one of the three. One after the other, since some
builds of torch weigh gigabytes, it gets a virtual environment of its own in a temporary place. A
cell that cannot be had here is listed with the reason. Needs nothing but the standard library.
Cells named on the command line run alone, and replace their rows in benchmarks/results/matrix.json:

    python dev.py matrix                                # all
    python dev.py matrix torch-2.11.0 python-3.10       # some
    python dev.py matrix --list
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/matrix.json"
PAGE = ROOT / "docs/versions.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"

FAST_HALF = (
    "tests/numerics",
    "tests/kernels",
    "tests/layers",
    "tests/plugins",
    "tests/telemetry",
    "tests/callbacks/run",
    "tests/test_imports.py",
    "tests/test_register.py",
)
"""What torch, Lightning and Python show through to; the other half stands upon it."""

GIGABYTES = 12
"""Free disk that a cell needs: a CUDA build of torch takes 6, beside what pip downloads."""


@dataclass(frozen=True)
class Cell:
    """One set of versions, and what came of it."""

    name: str
    python: str
    """"3.12"."""

    torch: str
    """A requirement: "==2.13.0", or "" for the newest that pip takes."""

    lightning: str
    """A requirement: "==2.5.6"."""

    result: str = "not run"
    """"passed", "failed", or why it is not to be had."""

    installed: dict[str, str] = field(default_factory=dict[str, str])
    tests: tuple[str, ...] = ()
    """What was run, where it was not the fast half."""

    counts: str = ""
    """pytest's last line."""

    failures: tuple[str, ...] = ()
    seconds: float = 0.0
    date: str = ""


def cells() -> list[Cell]:
    """The tested versions, and from there one step in each direction."""
    pins = (ROOT / "constraints-ci.txt").read_text() + (ROOT / "constraints.txt").read_text()
    torch = "==" + _pinned("torch", pins)
    tested = Cell("tested", "3.11", torch, "==" + _pinned("lightning", pins))
    others = [
        replace(tested, name=f"python-{each}", python=each) for each in ("3.10", "3.12", "3.13")
    ]
    others += [replace(tested, name=f"torch-{each}", torch=f"=={each}") for each in ("2.11.0",)]
    others.append(replace(tested, name="torch-newest", torch=""))
    lightnings = "2.5.0.post0", "2.5.6", "2.6.0"
    others += [replace(tested, name=f"lightning-{v}", lightning=f"=={v}") for v in lightnings]
    return [tested, *others]


def _pinned(package: str, pins: str) -> str:
    found = re.search(rf"^{package}==(\S+)", pins, re.MULTILINE)
    assert found is not None
    return found.group(1)


def try_cell(cell: Cell, directory: Path, tests: Iterable[str]) -> Cell:
    """Install and run one cell; what it installed is gone afterwards."""
    start = time.monotonic()
    cell = replace(cell, date=datetime.now(timezone.utc).date().isoformat())
    free = shutil.disk_usage(directory).free / 1e9
    if free < GIGABYTES:
        return replace(cell, result=f"needs {GIGABYTES} GB of disk, {free:.0f} are free")
    interpreter = find_python(cell.python)
    if interpreter is None:
        return replace(cell, result=f"no Python {cell.python} found on this machine")
    venv = directory / cell.name
    try:
        python = venv / "bin" / "python"
        said = _output([interpreter, "-m", "venv", "--clear", str(venv)])
        if said.returncode == 0:
            said = _output([str(python), *_install(cell, directory)], cwd=ROOT)
        if said.returncode != 0:
            return replace(cell, result=f"cannot be installed: {_why(said.stdout)}")
        cell = replace(cell, installed=_versions(python))
        done = _output(
            [str(python), "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env={
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        (directory / f"{cell.name}.log").write_text(done.stdout)
        lines = done.stdout.splitlines()
        return replace(
            cell,
            result="passed" if done.returncode == 0 else "failed",
            counts=_counts(lines),
            failures=tuple(line for line in lines if line.startswith(("FAILED", "ERROR")))[:40],
            seconds=round(time.monotonic() - start, 1),
        )
    finally:
        shutil.rmtree(venv, ignore_errors=True)
        shutil.rmtree(directory / "inductor", ignore_errors=True)


def find_python(version: str) -> str | None:
    """An interpreter of a minor version: this one, one on the path, or one that pyenv keeps."""
    if platform.python_version().startswith(f"{version}."):
        return sys.executable
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        said = _output([candidate, "-c", "import platform; print(platform.python_version())"])
        if said.returncode == 0 and said.stdout.startswith(f"{version}."):
            return candidate
    return None


def _install(cell: Cell, directory: Path) -> list[str]:
    """pip's arguments: the tested versions of all but torch, Lightning and what that bounds."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    bounded = "fsspec|lightning-utilities|packaging|pyyaml|torchmetrics|tqdm|typing-extensions"
    chosen = re.compile(rf"(torch|lightning|pytorch-lightning|{bounded})==")
    kept = directory / f"{cell.name}.txt"
    kept.write_text("\n".join(line for line in pins if not chosen.match(line)) + "\n")
    pip = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += ["--constraint", str(kept)]
    return [*pip, f"torch{cell.torch}", f"lightning{cell.lightning}", "--editable", ".[dev]"]


def _versions(python: Path) -> dict[str, str]:
    """What has been installed."""
    names = ("torch", "lightning", "torchao", "torchmetrics", "transformers", "peft")
    ask = (
        "import importlib.metadata, json, platform\n"
        f"found = {{name: importlib.metadata.version(name) for name in {names}}}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    return json.loads(_output([str(python), "-c", ask]).stdout)


def _counts(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed)", line)), "")


def _why(said: str) -> str:
    errors = [line for line in said.splitlines() if "ERROR" in line or "conflict" in line]
    return (errors or said.strip().splitlines() or ["pip said nothing"])[-1][:300]


def _output(
    command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


# --- What is kept of it -------------------------------------------------------------------------


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The results as the page has them."""
    lines = [
        "| Python | torch | lightning | torchao | result | tests | date |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        there = row["installed"]
        columns = [
            there.get("python", row["python"]),
            there.get("torch", row["torch"].removeprefix("==") or "newest"),
            there.get("lightning", row["lightning"].removeprefix("==")),
            there.get("torchao", ""),
            row["result"],
            _said(row),
            row["date"],
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _said(row: dict[str, Any]) -> str:
    """pytest's counts, and of how many files they are, if not of the fast half."""
    counts = re.sub(r",? \d+ (warnings?|deselected)| in .*|=", "", row["counts"]).strip()
    files = row.get("tests") or ()
    return f"{counts}, of {len(files)} files" if counts and files else counts


def write(done: Iterable[Cell]) -> None:
    """Put new rows into the results, in the order of the cells, and the table into the page."""
    rows = {row["name"]: row for row in kept()}
    rows.update({cell.name: vars(cell) for cell in done})
    ordered = [rows.get(cell.name, vars(cell)) for cell in cells()]
    content = {"machine": platform.machine(), "tests": FAST_HALF, "cells": ordered}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(ordered)}\n{END}{rest.partition(END)[2]}")


def kept() -> list[dict[str, Any]]:
    """The rows of earlier runs."""
    return json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py matrix", description=__doc__.split("\n\n")[0])
    parser.add_argument("cells", nargs="*", help="names of cells; all by default")
    parser.add_argument("--list", action="store_true", help="only list the cells")
    parser.add_argument("--tests", nargs="+", default=FAST_HALF, help="paths, for a quick look")
    parser.add_argument("--keep", type=Path, help="where logs of the cells go")
    given = parser.parse_args()
    every = {cell.name: cell for cell in cells()}
    if unknown := set(given.cells) - every.keys():
        parser.error(f"cells must be of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    if given.list:
        for cell in every.values():
            torch = cell.torch or " newest"
            print(f"{cell.name:24} Python {cell.python}, torch{torch}, lightning{cell.lightning}")
        return 0
    done: list[Cell] = []
    with tempfile.TemporaryDirectory(prefix="lightning_fp_matrix_") as made:
        directory = Path(made)
        for name in given.cells or every:
            print(f"{name} ...", end=" ", flush=True)
            others = () if tuple(given.tests) == FAST_HALF else tuple(given.tests)
            cell = replace(every[name], tests=others)
            done.append(try_cell(cell, directory, given.tests))
            print(f"{done[-1].result}  {done[-1].counts}", flush=True)
            for failure in done[-1].failures:
                print(f"  {failure}")
            if given.keep is not None and (log := directory / f"{name}.log").exists():
                given.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, given.keep)
            write(done[-1:])
    return 1 if any(cell.result == "failed" for cell in done) else 0


if __name__ == "__main__":
    sys.exit(main())
