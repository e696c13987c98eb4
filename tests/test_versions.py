"""The matrix of versions: which cells there are, and that the page has what was found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    path = ROOT / "benchmarks/versions/matrix.py"
    spec = importlib.util.spec_from_file_location("matrix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_every_cell_changes_one_version(matrix: ModuleType) -> None:
    tested, *others = matrix.cells()
    for cell in others:
        pairs = (cell.python, tested.python), (cell.torch, tested.torch)
        changed = [a != b for a, b in (*pairs, (cell.lightning, tested.lightning))]
        assert sum(changed) == 1, cell
    assert {cell.python for cell in others} == {"3.10", "3.11", "3.12", "3.13"}
    assert all((ROOT / path).exists() for path in matrix.FAST_HALF)


def test_what_is_pinned_besides(matrix: ModuleType, tmp_path: Path) -> None:
    command = matrix._install(matrix.cells()[1], tmp_path)
    pinned = Path(command[command.index("--constraint") + 1]).read_text()
    assert "torchao==" in pinned
    assert "\ntorch==" not in pinned
    assert "lightning==" not in pinned
    assert command[-2:] == ["--editable", ".[dev]"]


def test_a_python_that_is_not_there_is_the_reason(matrix: ModuleType, tmp_path: Path) -> None:
    cell = matrix.Cell("old", "3.1", "==2.13.0", "==2.6.6")
    assert matrix.try_cell(cell, tmp_path, []).result == "no Python 3.1 found on this machine"
    here = matrix.find_python(".".join(map(str, sys.version_info[:2])))
    assert here == sys.executable


def test_the_page_has_the_results(matrix: ModuleType) -> None:
    page = (ROOT / "docs/versions.md").read_text()
    assert matrix.kept()
    assert f"{matrix.BEGIN}\n{matrix.table(matrix.kept())}\n{matrix.END}" in page
