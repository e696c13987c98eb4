"""What all parts measured, as JSON and as a table; knows nothing of torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

_QUERY = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)


def clocks() -> str:
    """The clocks, power and temperature of the GPUs now, as nvidia-smi tells them, or why not."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return told.stdout.strip()


def write_results(
    out: Path, names: list[str], seen: dict[str, str], *, ended: str, dry: bool
) -> None:
    """Gather what is on disk.

    Args:
        out: the lane's directory.
        names: of the parts, in order.
        seen: the clocks before each part that has been begun.
        ended: why the last process ended before its parts did, or "".
        dry: whether the figures mean nothing.
    """
    parts = [
        _part(out / f"{name}.jsonl", name, seen[name], ended) for name in names if name in seen
    ]
    result = {"dry": dry, "query": _QUERY, "parts": parts}
    (out / "lane.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "lane.md").write_text(_table(parts, dry=dry))


def _part(path: Path, name: str, before: str, ended: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [line for line in lines if "what" in line]
    end = next((line for line in lines if "status" in line), None)
    if end is None:
        end = {"status": "failed", "reason": ended or "it was not begun", "seconds": None}
    how = {key: end[key] for key in ("status", "reason", "seconds")}
    return {"part": name, **how, "clocks": before, "rows": rows}


def _table(parts: list[dict[str, Any]], *, dry: bool) -> str:
    lines = ["**A dry run on a CPU: no figure below means anything.**", ""] if dry else []
    lines += ["| part | what | result | ratio | note |", "|---|---|---|---|---|"]
    for part in parts:
        for row in part["rows"]:
            value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            cells = part["part"], row["what"], value, ratio, row["note"]
            lines.append(f"| {' | '.join(str(c).replace('|', '/') for c in cells)} |")
        if part["status"] != "done":
            why = f"**{part['status']}**: {part['reason']}".replace("|", "/").replace("\n", " ")
            lines.append(f"| {part['part']} | | | | {why} |")
    return "\n".join(lines) + "\n"
