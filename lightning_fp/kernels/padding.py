"""Zeros where hardware wants whole blocks: no number of tokens ends a run.

A product sums over one dimension, and only that one has to be a multiple of anything where scales
are per tensor or per row; zeros there add nothing. Where blocks have a scale, zeros change none:
they are no one's amax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

WORTH_SAYING = 0.01
"""Share of FLOPs from which on what zeros cost is shown."""


def zeros_to(multiple: int, size: int) -> int:
    """How much is missing to the next multiple; of a symbolic size, without a branch."""
    return -size % multiple


def padded_share(padding: float, flops: float) -> float:
    """Share of all FLOPs that zeros take.

    Args:
        padding: FLOPs of the zeros.
        flops: those of everything else.
    """
    return padding / (padding + flops) if padding else 0.0


def whole(x: Tensor, *, rows: int = 1, columns: int = 1) -> Tensor:
    """A matrix, contiguous, with zeros up to the next multiples.

    Compiled code has no branch on the sizes: one graph serves every number of tokens. Zeros are
    written as bytes, which every device and compiler can; in FP8 formats they are zeros too.

    Args:
        x: [rows, columns], any dtype.
        rows: what the rows must be a multiple of.
        columns: likewise.

    Returns:
        The same dtype; x itself where nothing is to be done.
    """
    height, width = x.shape
    if torch.compiler.is_compiling():
        return _by_index(_by_index(x, 0, rows), 1, columns)
    if height % rows == 0 and width % columns == 0:
        # Of a single row torch takes any strides for contiguous, and cuBLAS does not.
        return _contiguous(x) if height > 1 else x.reshape(-1).view(1, width)
    source, low = _as_bytes(x)
    padded = F.pad(source, (0, -width % columns, 0, -height % rows))
    return padded.view(x.dtype) if low else padded


def _by_index(x: Tensor, dimension: int, multiple: int) -> Tensor:
    """The same along one dimension: a load behind a mask, of which the compiler makes the copy.

    Where the size is known to be a multiple there is nothing to load, and no pass over memory.
    """
    size = x.shape[dimension]
    if multiple == 1 or statically_known_true(size % multiple == 0):
        return _contiguous(x)
    source, low = _as_bytes(x)
    index = torch.arange((size + multiple - 1) // multiple * multiple, device=x.device)
    there = index < size
    picked = source.index_select(dimension, torch.where(there, index, 0))
    padded = torch.where(there if dimension else there.unsqueeze(1), picked, 0)
    return padded.view(x.dtype) if low else padded


def _as_bytes(x: Tensor) -> tuple[Tensor, bool]:
    low = x.dtype.itemsize == 1
    return (x.view(torch.uint8) if low else x), low


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else torch.clone(x, memory_format=torch.contiguous_format)
