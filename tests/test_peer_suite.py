"""The runner of Lightning's own tests: what counts as ours, and that it reaches Trainers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.peer.comparison import compared
from tests.peer.suite import ARMS, PLAIN, Result, Suite

BY_NAME = {arm.name: arm for arm in ARMS}


def result(test: str, outcome: str, message: str = "", trainers: int = 1) -> Result:
    return Result(test=test, outcome=outcome, message=message, trainers=trainers)


def test_only_what_passes_with_plain_lightning_is_ours() -> None:
    results = {
        "high": {t: result(t, "passed") for t in ("a", "b", "c")} | {"d": result("d", "failed")},
        "fp8-dynamic": {
            "a": result("a", "failed", "assert 0.11 == 0.12"),
            "b": result("b", "failed", "extra key lightning_fp.precision"),
            "c": result("c", "skipped"),
            "d": result("d", "failed"),
            "e": result("e", "failed", trainers=0),
        },
        PLAIN: {"a": result("a", "passed"), "d": result("d", "failed")},
    }
    high, low = compared(results)
    assert (high["name"], high["tests"], high["passed"], high["differ"]) == ("high", 4, 3, 0)
    assert (low["tests"], low["failed_plain_too"], low["differ"]) == (3, 1, 2)
    assert [each["reason"] for each in low["differences"]] == [
        "rounding, which vanishes under `high`",
        "the checkpoint's extra key",
    ]


SUITE = """
import os
import lightning as L
import pytest

def test_names_no_precision():
    trainer = L.Trainer(accelerator="cpu", logger=False)
    ours = type(trainer.precision_plugin).__name__ == "FP8Precision"
    watched = any(type(c).__name__ == "PrecisionFallback" for c in trainer.callbacks)
    assert not ours and not watched

def test_names_one():
    trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False)
    assert type(trainer.precision_plugin).__name__ == "MixedPrecision"

def test_dies():
    os._exit(3)
"""


@pytest.mark.slow
def test_the_plugin_reaches_the_trainers_of_another_suite(tmp_path: Path) -> None:
    room = tmp_path / "tests" / "tests_pytorch" / "trainer"
    room.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (room / "test_some.py").write_text(SUITE)
    suite = Suite(tmp_path, tmp_path / "results", python=sys.executable, timeout=100)
    for name, expected in ((PLAIN, "passed"), ("high+fallback", "failed")):
        suite.run(BY_NAME[name])
        found = {test.split("::")[1]: each for test, each in suite.read(BY_NAME[name]).items()}
        assert found["test_names_no_precision"].outcome == expected
        assert found["test_names_no_precision"].trainers == 1
        assert (found["test_names_one"].outcome, found["test_names_one"].trainers) == ("passed", 0)
        assert found["test_dies"].outcome == "died"
