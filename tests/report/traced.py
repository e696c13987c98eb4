"""Events of real runs, as the golden traces have kept them."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_fp.records import Event, read_events
from lightning_fp.records.run import LayerInfo, RunInfo, write_run

TRACES = Path(__file__).parents[1] / "golden" / "traces"

NAMES = sorted(path.stem for path in TRACES.glob("*.json"))


def write_traced(name: str, directory: Path) -> Path:
    """The records of a traced run: its events, and its layers in the format that they began in."""
    trace = json.loads((TRACES / f"{name}.json").read_text())
    lines = "".join(json.dumps({**event, "time": 0.0}) + "\n" for event in trace["events"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "events.jsonl").write_text(lines)
    _, formats = trace["formats"][0]
    layers = tuple(
        LayerInfo(name=layer, format=format, kernel="native", flops_share=None)
        for layer, format in formats.items()
    )
    write_run(directory, RunInfo(step=0, layers=layers))
    return directory


def traced_events(name: str, directory: Path) -> list[Event]:
    """The events of a traced run."""
    return read_events(write_traced(name, directory))
