"""tests/gpu, each test a row as it ends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from parts.card import Card
from parts.rows import NotHereError, Rows

ROOT = Path(__file__).resolve().parents[3]


def measure(card: Card, rows: Rows) -> None:
    missing = [name for name in ("pytest", "lightning", "torchmetrics") if not _there(name)]
    if missing:
        raise NotHereError(f"needs {', '.join(missing)}")
    import pytest

    # Not the project's own options: those name plugins of pytest that a bare machine lacks.
    bare = ["-c", str(Path(__file__).with_name("pytest.ini")), "--rootdir", str(ROOT)]
    bare += ["--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-s"]
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    wanted = files[:1] if card.small else files
    code = pytest.main([*bare, *map(str, wanted)], plugins=[_Told(rows)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        rows.add("pytest itself", None, note=f"ended with {code!s}; see the log")


class _Told:
    """Hears of each test as it ends."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            why = report.longreprtext.splitlines()[-1] if report.failed else ""
            if report.skipped:
                why = str(report.longrepr[-1])
            note = f"{report.outcome}{': ' if why else ''}{why}"
            self.rows.add(report.nodeid, report.duration, "s", note=note)


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec in sys.modules
        return False
