"""benchmarks/gpu/lane.py runs, in small and on the CPU, all of it and on a bare machine.

A card comes to hand rarely and for minutes: the lane must not fail then for a silly reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LANE = Path(__file__).parents[1] / "benchmarks" / "gpu" / "lane.py"
BARE = "lightning", "lightning_fabric", "torchao", "torchmetrics", "pyarrow", "rich", "pytest"


def lane(out: Path, *options: str, path: str = "") -> dict[str, dict[str, Any]]:
    """Its parts by name, after a dry run."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(LANE), "--dry", "--minutes", "3", "--out", str(out), *options]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "no figure below means anything" in told.stdout
    result = json.loads((out / "lane.json").read_text())
    assert result["dry"]
    return {part["part"]: part for part in result["parts"]}


def rows(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a part by what they measured; every one has a figure or the reason why not."""
    assert part["rows"]
    assert all(row["value"] is not None or row["note"] for row in part["rows"])
    return {row["what"]: row for row in part["rows"]}


@pytest.mark.slow
def test_every_part_of_a_bare_machine(tmp_path: Path) -> None:
    """Torch and nothing else, and the package from the checkout."""
    lines = [f"sys.modules[{name!r}] = None\n" for name in BARE]
    (tmp_path / "sitecustomize.py").write_text("import sys\n" + "".join(lines))
    parts = lane(tmp_path / "out", path=str(tmp_path))

    status = {name: part["status"] for name, part in parts.items()}
    assert status == {
        "machine": "done",
        "gpu_tests": "skipped",
        "gemms": "done",
        "stack": "done",
        "overhead": "skipped",
        "host_reads": "done",
        "recompiles": "done",
        "snapshots": "done",
        "rescue": "skipped",
    }
    assert parts["gpu_tests"]["reason"] == "needs pytest, lightning, torchmetrics"
    assert "lightning" in parts["overhead"]["reason"]
    assert "lightning" in parts["rescue"]["reason"]
    layers = rows(parts["gemms"])
    assert layers["layer small 32x32x64, compiled: fp8-delayed"]["ratio"] > 0
    assert layers["layer small 32x32x64, eager: fp8-delayed"]["ratio"] > 0
    predicted = layers["predicted, layer small 32x32x64, compiled: fp8-delayed"]
    assert 0 < predicted["value"] <= 1  # no gain is predicted for a layer this small
    measured = layers["layer small 32x32x64, compiled: fp8-delayed"]["ratio"]
    assert predicted["ratio"] == pytest.approx(measured / predicted["value"])
    assert "torchao" in layers["layer small 32x32x64, eager: torchao rowwise"]["note"]
    stack = rows(parts["stack"])
    assert stack["fp8-delayed, compiled"]["value"] > 0
    assert stack["predicted, fp8-delayed, compiled"]["value"] > 0
    assert rows(parts["overhead"])["sampled step, fp8-delayed, eager"]["value"] > 0
    assert rows(parts["host_reads"])["fp8-delayed, a sampled step"]["value"] == 0
    graphs = {what: row["note"] for what, row in rows(parts["recompiles"]).items()}
    assert graphs["fp8-dynamic: step 1"] == "1 graphs compiled"
    assert graphs["fp8-dynamic: step 2"] == "0 graphs compiled"
    assert rows(parts["snapshots"])["restore, turn 2"]["value"] > 0


@pytest.mark.slow
def test_the_parts_that_need_lightning(tmp_path: Path) -> None:
    parts = lane(tmp_path, "--only", "gpu_tests", "overhead", "rescue")
    assert {part["status"] for part in parts.values()} == {"done"}
    assert all(row["note"].startswith("skipped") for row in parts["gpu_tests"]["rows"])
    assert rows(parts["overhead"])["Trainer step, PrecisionFallback, turn 1"]["value"] > 0
    assert rows(parts["rescue"])["the same with PrecisionFallback"]["value"] > 0


def test_what_does_not_end_is_stopped_and_what_it_measured_is_kept(tmp_path: Path) -> None:
    parts = lane(tmp_path, "--only", "machine", "--minutes", "0")
    assert parts["machine"]["status"] != "done"
    assert "| machine |" in (tmp_path / "lane.md").read_text()
