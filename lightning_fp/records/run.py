"""What a run is: its options, layers, hardware and versions, one line of JSON for every start."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = "run.jsonl"
"""Name of the file inside of a run's directory."""


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One layer as it was when the run started."""

    name: str

    format: str
    """Its format's name; of a layer left alone, high precision's."""

    kernel: str
    """What multiplies it, in words."""

    flops_share: float | None
    """Its share of the model's FLOPs; None if they are not known."""

    reason: str | None = None
    """Why it was left alone; None if it was converted."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run, each time it starts or resumes."""

    step: int
    """Optimizer steps done when it started."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Options by the class of the plugin and of each callback, as plain data."""

    layers: tuple[LayerInfo, ...] = ()

    parameters: int = 0
    """Number of the model's parameters, this rank's where they are sharded."""

    device: str = ""
    world_size: int = 1
    strategy: str = ""
    """The strategy's class."""

    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of Python and the packages that matter."""

    time: float = field(default_factory=time.time)
    """Unix time in seconds."""


def write_run(run_dir: str | Path, info: RunInfo) -> None:
    """Append a start of the run to `<run_dir>/run.jsonl`.

    Args:
        run_dir: the run's directory; made if it is not there.
        info: what to write; settings that are not plain data are written as text.
    """
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(asdict(info), default=str).encode() + b"\n")


def read_run(run_dir: str | Path) -> list[RunInfo]:
    """Every start of a run, oldest first; empty if nobody has written any.

    Args:
        run_dir: the directory that the run wrote to.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        return []
    known = {item.name for item in fields(RunInfo)}
    starts: list[RunInfo] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            values: dict[str, Any] = json.loads(line)
            values["layers"] = tuple(LayerInfo(**layer) for layer in values["layers"])
            starts.append(RunInfo(**{n: value for n, value in values.items() if n in known}))
        except (ValueError, KeyError, TypeError) as error:  # cut short, or of a later version
            log.warning("%s: line %d is left out: %s", path, number, error)
    return starts
