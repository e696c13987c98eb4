"""What a run is: its options, layers, hardware and versions, one line of JSON for every start."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.records.jsonl import append_line, read_lines, step_of
from lightning_fp.records.newest_run import newest_run

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

    model: str = ""
    """The class of the model; empty in records of earlier versions."""

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
    append_line(Path(run_dir) / FILE, asdict(info))


@checked
def read_run(run_dir: str | Path) -> list[RunInfo]:
    """Every start of a run, oldest first; empty if nobody has written any.

    Args:
        run_dir: the directory that the run wrote to.
    """
    return [start for _, start in read_lines(newest_run(run_dir) / FILE, _start)]


def _start(values: dict[str, Any]) -> RunInfo:
    values["step"] = step_of(values)
    values["layers"] = tuple(LayerInfo(**layer) for layer in values["layers"])
    known = {item.name for item in fields(RunInfo)}  # a later version may have more
    return RunInfo(**{name: value for name, value in values.items() if name in known})
