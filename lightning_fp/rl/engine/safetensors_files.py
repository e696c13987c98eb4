"""Safetensors files, written tensor by tensor: no more than one is in memory.

The format (github.com/huggingface/safetensors): eight bytes with the length of a header in JSON,
the header, the tensors' bytes one after the other. A header tells dtype, shape and place of each
tensor before any is written, which is why all of them are known by shape first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES: Mapping[torch.dtype, str] = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls a dtype."""

_ALIGNMENT = 8
"""Bytes that a header is filled up to, as the library does."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tensors that are made together."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Dtype and shape by name."""

    make: Callable[[], Sequence[Tensor]]
    """Their values, in this order."""

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(_size(dtype, shape) for dtype, shape in self.tensors.values())


def write_safetensors(path: Path, parts: Sequence[Part]) -> None:
    """Write a file; it is there whole, or not at all.

    Args:
        path: where to.
        parts: what to write, made one after the other.

    Raises:
        ValueError: if a tensor has a dtype that the format lacks, or is not as was said.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for part in parts:
        for name, (dtype, shape) in part.tensors.items():
            if dtype not in NAMES:
                raise ValueError(
                    f"{name!r} must be of a dtype that safetensors has here, got {dtype}; these are"
                    f" {', '.join(str(each) for each in NAMES)}"
                )
            end = place + _size(dtype, shape)
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [place, end],
            }
            place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for part in parts:
                for (name, said), tensor in zip(part.tensors.items(), part.make(), strict=True):
                    if said != (tensor.dtype, tuple(tensor.shape)):
                        raise ValueError(
                            f"{name!r} must be {said}, got {(tensor.dtype, tuple(tensor.shape))}"
                        )
                    file.write(_bytes(tensor))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    if flat.numel() == 1:  # an expanded one counts as contiguous, and has no bytes to view
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
