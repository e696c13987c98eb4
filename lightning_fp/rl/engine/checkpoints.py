"""The weights of a checkpoint, read one after the other, with the formats it was trained in.

A Trainer's checkpoint file, the directory that a sharded one is (torch.distributed.checkpoint), or
a run, of which the newest checkpoint is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fp.kernels.memory import WEIGHT
from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.layers.rules import clean_name
from lightning_fp.numerics import DelayedScaling, float_format, history_scale
from lightning_fp.rl.engine.weights import LayerWeight, Stored, Weights, of_format, stored

STATE_KEY = "lightning_fp.precision"
"""Where the plugin keeps its state, see `lightning_fp.plugins.base`."""

_META = "meta.pt"
"""What Lightning calls the part of a sharded checkpoint that is no tensor of the model."""

_STATE = "state_dict."


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: a checkpoint, or a directory with any below it: the newest is meant.

    Raises:
        ValueError: if there is none.
    """
    place = Path(path)
    if place.is_file() or _is_sharded(place):
        return place
    files = [*place.rglob("*.ckpt"), *(meta.parent for meta in place.rglob(".metadata"))]
    found = [each for each in files if each.is_file() or _is_sharded(each)]
    if not found:
        raise ValueError(
            f"path must be a checkpoint, or a run with one, got {str(place)!r}; a run keeps its"
            " checkpoints where its ModelCheckpoint writes"
        )
    return max(found, key=lambda each: each.stat().st_mtime)


def weights_in(path: str | Path, formats: Mapping[str, str] | None = None) -> Weights:
    """The weights of a checkpoint.

    Args:
        path: see `find_checkpoint`.
        formats: by layer, instead of those that the checkpoint says it was trained in.

    Raises:
        ValueError: if it is no checkpoint of a run of this package, or no layer is in FP8.
    """
    place = find_checkpoint(path)
    try:
        read, state = _sharded(place) if _is_sharded(place) else _whole(place)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"path must be a checkpoint that loads with weights_only=True, got {str(place)!r}:"
            f" {what}"
        ) from error
    tensors = {clean_name(name): value for name, value in read.items()}
    table = state.get(STATE_KEY)
    if table is None and formats is None:
        raise ValueError(
            f"path must be a checkpoint of a run with FP8Precision, got {str(place)!r}, which has"
            f" no {STATE_KEY!r}; export a model in a loop of your own with"
            " lightning_fp.rl.export_model"
        )
    layers = {
        name: layer
        for name, layer in _layers(table or {}, formats).items()
        if not layer.format.is_high_precision
    }
    if not layers:
        raise ValueError(
            f"path must be a checkpoint with layers in FP8, got {str(place)!r}, in which all are in"
            " high precision"
        )
    return Weights(tensors=tensors, layers=layers)


def _layers(table: Mapping[str, Any], formats: Mapping[str, str] | None) -> dict[str, LayerWeight]:
    names: Mapping[str, str] = table.get("formats", {}) if formats is None else formats
    scales: Mapping[str, Any] = table.get("scales", {})
    histories = dict(zip(scales.get("layers", ()), scales.get("history", ()), strict=False))
    config = DelayedScaling(**scales.get("config", {}))
    layers: dict[str, LayerWeight] = {}
    for name, written in names.items():
        format = linear_format(written)
        scale = None
        if format.scaling == "delayed" and name in histories:
            scale = _delayed_scale(histories[name], format, config)
        layers[name] = of_format(format, scale)
    return layers


def _delayed_scale(history: Tensor, format: LinearFormat, config: DelayedScaling) -> Tensor:
    limit = torch.tensor(float_format(format.weight).max)
    return history_scale(history[WEIGHT], limit, config)


def _is_sharded(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _whole(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The model's tensors of a file, and all that is in it."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: stored(value) for name, value in state.get("state_dict", {}).items()}, state


def _sharded(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The model's tensors of a directory, and what is beside them."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Stored] = {}
    for key, entry in metadata.items():
        if not key.startswith(_STATE) or not isinstance(entry, TensorStorageMetadata):
            continue
        shape, dtype = tuple(entry.size), entry.properties.dtype
        load: Callable[[], Tensor] = partial(_load, path, key, shape, dtype)
        tensors[key.removeprefix(_STATE)] = Stored(shape=shape, dtype=dtype, load=load)
    meta = path / _META
    return tensors, torch.load(
        meta, map_location="cpu", weights_only=True
    ) if meta.is_file() else {}


def _load(path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor of a sharded checkpoint, whole."""
    from torch.distributed.checkpoint.state_dict_loader import load

    tensor = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process, which is what is wanted
        load({key: tensor}, checkpoint_id=str(path), no_dist=True)
    return tensor
