"""Prints the matrix of strategies into docs/many-devices.md: `python -m tests.strategy_matrix`.

What it prints is what `pytest -m slow tests/loop/test_matrix.py` has found, in
benchmarks/results/strategies.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.loop.matrix_ranks import FORMATS, STRATEGIES, Cell

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "many-devices.md"
RESULTS = ROOT / "benchmarks" / "results" / "strategies.json"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
WORDS = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "hsdp": "HSDP",
    "tensor parallel": "tensor parallel",
    "two dimensions": "FSDP2 x tensor parallel",
}


def keep(found: Mapping[Cell, str]) -> None:
    """Write down what was found: "" for a cell that runs, else why not."""
    rows = [{**_fields(cell), "refused": why} for cell, why in sorted(found.items())]
    RESULTS.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")


def _fields(cell: Cell) -> dict[str, object]:
    return {name: getattr(cell, name) for name in Cell.__dataclass_fields__}


def kept() -> dict[Cell, str]:
    """See `keep`."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {
        Cell(**{k: v for k, v in row.items() if k != "refused"}): row["refused"] for row in rows
    }


def table(found: Mapping[Cell, str]) -> str:
    """In Markdown: of each strategy and format how many of the combinations run."""
    lines = [f"| | | {' | '.join(f'`{each}`' for each in FORMATS)} |", f"|---|---|{'---|' * 9}"]
    for strategy in STRATEGIES:
        for compiled in (False, True):
            texts = [_text(found, strategy, compiled, each) for each in FORMATS]
            how = "compiled" if compiled else "eager"
            lines.append(f"| {WORDS[strategy]} | {how} | {' | '.join(texts)} |")
    reasons = sorted({why for why in found.values() if why})
    return "\n".join([*lines, *(f"\n- {why}" for why in reasons)])


def _text(found: Mapping[Cell, str], strategy: str, compiled: bool, format: str) -> str:
    own = [
        why
        for cell, why in found.items()
        if (cell.strategy, cell.compiled, cell.format) == (strategy, compiled, format)
    ]
    runs = sum(not why for why in own)
    return "runs" if runs == len(own) else f"{runs} of {len(own)}"


def page() -> str:
    """The page with the table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(kept())}\n{END}{after}"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
