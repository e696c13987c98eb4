"""What a run did as plain values, and how two such traces differ.

A trace has everything that a change of structure must leave alone, down to the last bit: events,
formats, losses, weights, the state of optimizers, plugin and callbacks. It has no times, no paths
and no names of classes that are not public.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.demo import read_sources
from lightning_fp.records import read_statistics, read_steps

NOT_TRACED = {"time", "seconds", "incident_seconds", "position", "content"}
"""Fields that differ from run to run. `position` is how many bytes of events, times among them;
`content` of a snapshot has gaps that align its tensors, in which there is anything."""

LOSS_EVERY = 8
"""One step in so many has its loss in the trace: enough to see where two runs part."""

LONGEST = 200
"""A piece of state that is longer as JSON is in the trace as its hash."""


class Recorder(L.Callback):
    """Notes the formats and losses of the steps; to stand first among the callbacks.

    `Ending` notes what there is at the end, and stands last.
    """

    def __init__(self) -> None:
        self.formats: list[Any] = []
        self.losses: list[Any] = []
        self._now: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """The formats that this step ran in: nobody has had his turn yet since."""
        step = trainer.global_step
        formats = trainer.precision_plugin.precision_map.formats()
        changed = {n: format for n, format in formats.items() if self._now.get(n) != format}
        if changed:
            self.formats.append([step, changed])
        self._now = dict(formats)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and step % LOSS_EVERY == 0:
            self.losses.append([step, canonical(float(loss))])


class Ending(L.Callback):
    """Notes weights and state when training ends; to stand last among the callbacks."""

    def __init__(self, traced: list[L.Callback]) -> None:
        self.traced = traced
        self.end: dict[str, Any] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the callbacks let go of what they hold."""
        checkpoint: dict[str, Any] = {}
        trainer.precision_plugin.on_save_checkpoint(checkpoint)
        self.end = {
            "steps": trainer.global_step,
            "weights": digest(dict(sorted(pl_module.state_dict().items()))),
            "optimizers": [digest(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "plugin": {key: summary(state) for key, state in checkpoint.items()},
            "callbacks": {type(c).__name__: summary(c.state_dict()) for c in self.traced},
        }


def trace(directory: Path, *fits: tuple[Recorder, Ending]) -> dict[str, Any]:
    """All of one run, which was made in one fit or several.

    Args:
        directory: where its records are.
        fits: the first and the last callback of each.
    """
    told: dict[str, Any] = {
        "events": _events(directory),
        "formats": [entry for recorder, _ in fits for entry in recorder.formats],
        "losses": [entry for recorder, _ in fits for entry in recorder.losses],
        **fits[-1][1].end,
    }
    # A column that is new is then one difference, not all.
    for name, read in (("statistics", read_statistics), ("loss_rows", read_steps)):
        try:
            table = read(directory)
        except FileNotFoundError:  # nobody was asked to write one
            continue
        if len(table):
            kept = [column for column in table.column_names if column not in NOT_TRACED]
            told[name] = {column: digest(table[column].to_pylist()) for column in kept}
    return told


def _events(directory: Path) -> list[dict[str, Any]]:
    """Every line of the log, also those that a resume has made void."""
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [canonical(json.loads(line)) for line in lines]


# --- Plain values -------------------------------------------------------------------------------


def canonical(value: Any) -> Any:
    """What JSON can hold exactly: of a tensor its hash, of inf and NaN their names."""
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items() if k not in NOT_TRACED}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {digest(value)}".removeprefix("torch.")
    if isinstance(value, torch.dtype) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a trace holds plain values and tensors, got {type(value).__name__}")


def digest(value: Any) -> str:
    """Of a tensor's bytes, or of anything that is plain."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        content = flat.numpy().tobytes()
    else:
        content = json.dumps(canonical(value), allow_nan=False).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by its keys; what is long as its hash."""
    pieces = {key: canonical(piece) for key, piece in state.items() if key not in NOT_TRACED}
    long = {key for key, piece in pieces.items() if len(json.dumps(piece)) > LONGEST}
    return {key: digest(pieces[key]) if key in long else piece for key, piece in pieces.items()}


def to_json(value: Mapping[str, Any]) -> str:
    """A line for every entry of a list, so that a diff of two files can be read."""
    parts: list[str] = []
    for key, piece in value.items():
        if isinstance(piece, list) and piece:
            lines = ",\n  ".join(json.dumps(item) for item in piece)
            parts.append(f"{json.dumps(key)}: [\n  {lines}\n ]")
        elif isinstance(piece, dict) and piece:
            lines = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in piece.items())
            parts.append(f"{json.dumps(key)}: {{\n  {lines}\n }}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(piece)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


# --- The machine --------------------------------------------------------------------------------


def fingerprint() -> dict[str, str]:
    """What exact bits depend on: versions, the CPU's instructions, the text that is trained on."""
    return {
        "torch": version("torch"),
        "torchao": version("torchao"),
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "text": digest(read_sources()[0]),
        "arithmetic": digest(_arithmetic()),
    }


def _arithmetic() -> list[Tensor]:
    """Small products and reductions of the kinds that the runs consist of."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.rand(64, 192, generator=generator) - 0.5 for _ in range(2))
    results: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), w.to(dtype)
        q = a.view(1, 2, 64, 96)
        results += [a @ b.T, a.T @ b, a.sum(), a.square().mean().sqrt(), a.norm()]
        results += [F.gelu(a), a.softmax(1), F.layer_norm(a, (192,)), a.exp().log()]
        results.append(F.scaled_dot_product_attention(q, q, q, is_causal=True))
    return results


# --- Differences --------------------------------------------------------------------------------


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """A line for each place at which two traces differ.

    Args:
        before: recorded.
        after: of now.
        where: what the two are.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            place = f"{where}.{key}" if where else key
            if key not in after:
                yield f"{place}: {json.dumps(before[key])} is gone"
            elif key not in before:
                yield f"{place}: {json.dumps(after[key])} is new"
            else:
                yield from differences(before[key], after[key], place)
    elif isinstance(before, list) and isinstance(after, list):
        yield from _differences_of_lists(before, after, where)
    elif json.dumps(before) != json.dumps(after):
        yield f"{where}: {json.dumps(before)} -> {json.dumps(after)}"


def _differences_of_lists(before: list[Any], after: list[Any], where: str) -> Iterator[str]:
    old, new = ([json.dumps(item) for item in items] for items in (before, after))
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    for what, i, i_end, j, j_end in matcher.get_opcodes():
        if what == "equal":
            continue
        shared = min(i_end - i, j_end - j)
        for k in range(shared):
            place = f"{where}[{i + k}]{_step(before[i + k])}"
            yield from differences(before[i + k], after[j + k], place)
        for k in range(i + shared, i_end):
            yield f"{where}[{k}]{_step(before[k])}: {old[k]} is gone"
        for k in range(j + shared, j_end):
            yield f"{where}[{k}]{_step(after[k])}: {new[k]} is new"


def _step(entry: Any) -> str:
    """At which step an entry of a list is, if it says so."""
    if isinstance(entry, dict) and "step" in entry:
        return f" (step {entry['step']}, {entry.get('kind', '')})"
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int):
        return f" (step {entry[0]})"
    return ""
