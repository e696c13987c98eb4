"""Runs the tests of a checkout of Lightning, plain and with our plugin, directory by directory.

Each arm keeps one file of results. What is in it is not run again, so that a run which was
interrupted goes on where it was; a test in which the process died counts as failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What the Trainers of one run are given."""

    name: str
    format: str = ""
    fallback: bool = False


ARMS = [
    Arm(name=PLAIN),
    Arm(name="high", format="high"),
    Arm(name="high+fallback", format="high", fallback=True),
    Arm(name="fp8-dynamic", format="fp8-dynamic"),
    Arm(name="fp8-dynamic+fallback", format="fp8-dynamic", fallback=True),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How one test ended."""

    test: str
    outcome: str
    """ "passed", "failed", "skipped", "xfailed", or "died" with the process."""
    trainers: int = 0
    """How many Trainers that name no precision it made: without one, nothing can differ."""
    seconds: float = 0.0
    message: str = ""
    """Of the exception, or why it was skipped."""


class Suite:
    """The tests of one checkout, and where their results lie.

    Args:
        checkout: of Lightning's repository, at the installed release.
        results: a directory for the files of results; those in it are kept.
        python: an interpreter that has what Lightning's tests need.
        timeout: seconds for one test.
        only: the directories to run; None for all.
        without: a regular expression; tests with a name in which it is found are left out.
    """

    def __init__(
        self,
        checkout: Path,
        results: Path,
        *,
        python: str,
        timeout: float,
        only: list[str] | None = None,
        without: str | None = None,
    ) -> None:
        self.checkout = checkout.resolve()
        self.tests = self.checkout / "tests" / "tests_pytorch"
        if not self.tests.is_dir():
            raise ValueError(
                f"PATH must be a checkout of Lightning with tests/tests_pytorch, got {checkout};"
                " clone it, and check out the tag of the release that is installed"
            )
        self.results, self.python, self.timeout = results.resolve(), python, timeout
        self.only = only
        self.without = None if without is None else re.compile(without)
        self.results.mkdir(parents=True, exist_ok=True)

    def rooms(self) -> list[str]:
        """The parts to run, in a process of their own each."""
        rooms = self.all_rooms()
        return rooms if self.only is None else [room for room in self.only if room in rooms]

    def all_rooms(self) -> list[str]:
        """The directories, and the files beside them."""
        entries = sorted(path for path in self.tests.iterdir() if path.name != "conftest.py")
        return [p.name for p in entries if p.is_dir() and any(p.rglob("test_*.py"))] + [
            path.name for path in entries if path.match("test_*.py")
        ]

    def file(self, arm: Arm) -> Path:
        """Where an arm's results lie."""
        return self.results / f"{arm.name}.jsonl"

    def read(self, arm: Arm) -> dict[str, Result]:
        """The last result of each test."""
        file = self.file(arm)
        lines = file.read_text().splitlines() if file.exists() else []
        found: dict[str, Result] = {}
        for line in map(json.loads, lines):
            died = line["outcome"] == "started"
            found[line["test"]] = Result(**{**line, **({"outcome": "died"} if died else {})})
        return found

    def run(self, arm: Arm, *, only: Iterable[str] | None = None) -> None:
        """Run what has no result yet; and once more, apart from the others, what failed.

        Args:
            arm: what the Trainers are given.
            only: the tests to run; None for all.
        """
        wanted = None if only is None else list(only)
        for room in self.rooms():
            inside = None if wanted is None else [t for t in wanted if t.startswith(room)]
            if inside is None or inside:
                self._run_room(arm, room, inside)
        bad = [r for r in self.read(arm).values() if r.outcome in ("failed", "died")]
        failed = [r.test for r in bad if r.trainers or r.outcome == "died"]
        if wanted is not None:
            failed = [test for test in failed if test in set(wanted)]
        self.again(arm, failed)

    def again(self, arm: Arm, tests: list[str]) -> None:
        """Run tests whatever result they have."""
        for room in self.rooms():
            if inside := [test for test in tests if test.startswith(room)]:
                self._pytest(arm, room, inside)

    def _run_room(self, arm: Arm, room: str, wanted: list[str] | None) -> None:
        """Until each test has a result: the process may die in one."""
        wanted = self._collect(room) if wanted is None else wanted
        if self.without is not None:
            wanted = [test for test in wanted if self.without.search(test) is None]
        while left := [test for test in wanted if test not in self.read(arm)]:
            before = len(self.read(arm))
            self._pytest(arm, room, left)
            if len(self.read(arm)) == before:
                raise RuntimeError(f"pytest ran nothing of {room}; call it by hand to see why")

    def _collect(self, room: str) -> list[str]:
        out = self._call([room, "--collect-only", "-q"], {"PEER_RESULTS": os.devnull})
        return [line for line in out.splitlines() if line.startswith(room) and "::" in line]

    def _pytest(self, arm: Arm, room: str, tests: list[str]) -> None:
        print(f"{arm.name}: {room}, {len(tests)} tests", flush=True)
        chosen = self.results / "chosen.txt"
        chosen.write_text("\n".join(tests))
        environment = {
            "PEER_FORMAT": arm.format,
            "PEER_FALLBACK": "1" if arm.fallback else "",
            "PEER_RESULTS": str(self.file(arm)),
            "PEER_ONLY": str(chosen),
        }
        options = ["-q", f"--timeout={self.timeout}", "--continue-on-collection-errors"]
        self._call([room, *options], environment)

    def _call(self, arguments: list[str], environment: dict[str, str]) -> str:
        """Run pytest in the suite's own directory, with its own configuration."""
        path = os.pathsep.join([str(HERE), str(ROOT), str(self.tests.parent)])
        command = [self.python, "-m", "pytest", "-p", "lightning_fp_injection"]
        command += ["-c", str(self.checkout / "pyproject.toml"), f"--rootdir={self.tests}"]
        command += ["-p", "no:cacheprovider", "-p", "no:rerunfailures", "--color=no", *arguments]
        done = subprocess.run(
            command,
            cwd=self.tests,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        (self.results / "last_output.txt").write_text(done.stdout)
        return done.stdout
