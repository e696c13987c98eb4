"""Write a checkpoint's weights in a format that inference engines load."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_fp.cli.output import console, print_json
from lightning_fp.rl.engine.checkpoint_formats import FormatName
from lightning_fp.rl.engine.checkpoints import find_checkpoint, weights_in
from lightning_fp.rl.engine.export import export_weights
from lightning_fp.shown import a_kind


def run(
    checkpoint: str,
    format: FormatName,
    output: str,
    config: str | None,
    prefix: str,
    *,
    requantise: bool,
    json: bool,
) -> int:
    """Export, and print what was written; see `commands.export`.

    Raises:
        ValueError: if there is no such checkpoint, or it cannot be exported so.
    """
    place = find_checkpoint(checkpoint)
    weights, completed = weights_in(place), None if config is None else _read(config)
    try:
        exported = export_weights(
            weights, output, format, config=completed, prefix=prefix, requantise=requantise
        )
    except OSError as error:
        raise ValueError(f"--output must be writable, got {output!r}: {error}") from error
    if json:
        print_json({"checkpoint": str(place), "output": output, **asdict(exported)})
        return 0
    screen = console()
    screen.print(f"{place} -> {output} ({format})", markup=False, soft_wrap=True)
    for line in exported.lines():
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def _read(path: str) -> dict[str, Any]:
    try:
        read = json_.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config must be a config.json, got {path!r}: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"--config must be a JSON object, got {a_kind(read)} in {path!r}")
    return read
