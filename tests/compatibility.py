"""Writes docs/compatibility.md from the marks of the tests: `python -m tests.compatibility`.

A test that shows that something works, or is refused, carries a row of the page:

    @pytest.mark.compatibility("optimizers", "SAM", "works")
    @pytest.mark.compatibility("layers", "nn.LSTM", "works with a note", "left in high precision")

The marks are read from the sources, so that nothing needs to be imported.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PEERS = ROOT / "benchmarks" / "results" / "peer_suite.json"
KINDS = ("optimizers", "loops", "layers", "dtypes", "wrappers")
VERDICTS = ("works", "works with a note", "refused")

INTRODUCTION = """\
# Compatibility

Whatever trains under Lightning should train under this package. Each row has a test that runs it,
most of them beside plain Lightning on the same program. The page is written from the tests' marks
by `python dev.py compatibility`, and a test checks that the two agree. *Refused* means: an error at
the start that names the reason and the way out.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one test shows."""

    kind: str
    what: str
    verdict: str
    note: str
    test: str
    """Its file below tests/, and its name."""


def rows() -> list[Row]:
    """All marks, by kind and then by name.

    Raises:
        ValueError: for a mark with a kind or a verdict that there is not.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [row for file in files for row in _rows_of(file)]
    return sorted(found, key=lambda row: (KINDS.index(row.kind), row.what.strip("`").lower()))


def _rows_of(file: Path) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8")
    if "mark.compatibility" not in text:
        return
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in (node for each in function.decorator_list for node in ast.walk(each)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.compatibility"):
                kind, what, verdict, *note = (ast.literal_eval(each) for each in call.args)
                name = f"{file.relative_to(ROOT / 'tests')}::{function.name}"
                if kind not in KINDS or verdict not in VERDICTS:
                    raise ValueError(f"{name}: kind must be of {KINDS}, verdict of {VERDICTS}")
                yield Row(kind=kind, what=what, verdict=verdict, note="".join(note), test=name)


def page() -> str:
    """The page as the tests, and the results of Lightning's own, have it."""
    lines = [INTRODUCTION]
    for kind in KINDS:
        lines += [f"## {kind.capitalize()}", "", "| | | shown by |", "|---|---|---|"]
        for row in (row for row in rows() if row.kind == kind):
            verdict = f"{row.verdict}: {row.note}" if row.note else row.verdict
            lines.append(f"| {row.what} | {verdict} | `{row.test}` |")
        lines.append("")
    if PEERS.exists():
        lines += peers(json.loads(PEERS.read_text()))
    return "\n".join(lines)


def peers(results: dict[str, Any]) -> list[str]:
    """The section on Lightning's own tests."""
    lines = [
        "## Lightning's own tests",
        "",
        f"The tests of Lightning {results['tests_of']} under lightning {results['lightning']}, with"
        " our plugin",
        "in every Trainer that names no precision (`python dev.py peer-suite PATH`, PATH being a",
        "checkout of Lightning's repository). A test counts as different only if it passes with",
        f"plain Lightning on the same machine. {results['scope']}",
        "",
        "| format | tests with a Trainer | pass | fail with plain Lightning too | differ |",
        "|---|---|---|---|---|",
    ]
    for arm in results["arms"]:
        counts = [arm[key] for key in ("tests", "passed", "failed_plain_too", "differ")]
        lines.append(f"| `{arm['name']}` | {' | '.join(map(str, counts))} |")
    lines += [
        "",
        "`high`: our plugin, every layer in high precision; `+fallback`: with `PrecisionFallback`.",
    ]
    differing = {(d["test"], d["reason"]) for arm in results["arms"] for d in arm["differences"]}
    if differing:
        lines += ["", "What differs:", ""]
    for test, reason in sorted(differing):
        arms = [
            a["name"] for a in results["arms"] if any(d["test"] == test for d in a["differences"])
        ]
        lines.append(f"- `{test}` ({', '.join(arms)}): {reason}")
    return [*lines, ""]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(rows())} rows")


if __name__ == "__main__":
    main()
