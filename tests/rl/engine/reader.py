"""A reader of FP8 checkpoints that knows nothing of what wrote them: bytes, JSON and numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I64": np.int64,
}


def read_file(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    header.pop("__metadata__")
    data, arrays, end = raw[8 + length :], {}, 0
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert first == end, "no gaps"
        end = last
        array = np.frombuffer(data[first:last], dtype=DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    assert end == len(data)
    return arrays


def read_directory(directory: Path) -> dict[str, np.ndarray]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return read_file(directory / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    arrays: dict[str, np.ndarray] = {}
    for file in dict.fromkeys(places.values()):
        part = read_file(directory / file)
        assert {name for name, place in places.items() if place == file} == set(part)
        arrays |= part
    return arrays


def dequantised(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 by name, by what the config says of each format."""
    suffix = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}[config["quant_method"]]
    values: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith(suffix):
            continue
        value = array.astype(np.float32)
        if array.dtype == ml_dtypes.float8_e4m3fn:
            scale = arrays[name + suffix]
            assert scale.dtype == np.float32
            if scale.ndim == 2 and scale.shape != (len(value), 1):
                assert scale.shape == blocks(value.shape)
                scale = scale.repeat(128, 0)[: value.shape[0]].repeat(128, 1)[:, : value.shape[1]]
            value = value * scale
        values[name] = value
    return values


def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // 128) for size in shape)
