"""Blocks of a matrix that share one scale: 1x128, 128x128, 1x32, and their transposes.

A block is (rows, columns). At the right and lower edge, where a dimension is no multiple, blocks
are smaller; nothing is padded with values that could count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Block = tuple[int, int]

E8M0_MAX = 127
"""Exponents of an E8M0 scale reach from -127 to 127 (OCP Microscaling specification v1.0)."""


def block_amax(x: Tensor, block: Block) -> Tensor:
    """Largest magnitude of each block.

    Args:
        x: [rows, columns], any floating-point dtype.
        block: its rows and columns.

    Returns:
        float32 [ceil(rows / block rows), ceil(columns / block columns)]; NaN and inf appear only
        in the blocks that hold them.
    """
    size, (rows, columns) = x.detach().abs(), x.shape
    ragged = -rows % block[0], -columns % block[1]
    if any(ragged):
        size = F.pad(size, (0, ragged[1], 0, ragged[0]))
    return _grouped(size, block).amax(dim=3).amax(dim=1).float()


def times_blocks(x: Tensor, factors: Tensor, block: Block) -> Tensor:
    """Multiply each value by the factor of its block.

    Args:
        x: [rows, columns], any floating-point dtype of 16 bits or more.
        factors: float32, one per block, as `block_amax`.
        block: its rows and columns.

    Returns:
        float32 [rows, columns], new.
    """
    if x.shape[0] % block[0] or x.shape[1] % block[1]:
        return x * spread_blocks(factors, block, x.shape)
    return (_grouped(x, block) * factors[:, None, :, None]).view(x.shape)


def spread_blocks(factors: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """The factor of each value's block.

    Args:
        factors: one per block, as `block_amax`.
        block: its rows and columns; in compiled code powers of two.
        shape: [rows, columns] of the matrix.

    Returns:
        [rows, columns].
    """
    if torch.compiler.is_compiling():
        return _picked(_picked(factors, 0, block[0], shape[0]), 1, block[1], shape[1])
    whole = factors[:, None, :, None].expand(-1, block[0], -1, block[1])
    whole = whole.reshape(factors.shape[0] * block[0], factors.shape[1] * block[1])
    return whole[: shape[0], : shape[1]]


def amax_to_e8m0(amax: Tensor, limit: float) -> Tensor:
    """The power of two that an MX block is multiplied by, its stored exponent rounded up.

    With the exponent rounded up nothing is clamped. Rounded down, as the OCP specification has
    it, values within the uppermost part of a binade are, and training in MXFP8 gets worse
    (arXiv 2506.08027). The same arithmetic as torchao's RCEIL, so that casts are equal bit for bit.

    Args:
        amax: float32, non-negative, any shape.
        limit: largest finite value of the element format.

    Returns:
        float32, same shape: from 2**-127 to 2**126, and 1 for a block below that, whose values
        become 0. NaN stays NaN. The scale of inf keeps inf in the block, and flushes the others.
    """
    exponent = (amax / limit).log2().ceil().clamp(-E8M0_MAX, E8M0_MAX)
    return torch.where(exponent == -E8M0_MAX, 1.0, torch.exp2(-exponent))


def _picked(factors: Tensor, dimension: int, length: int, size: int) -> Tensor:
    """`spread_blocks` along one dimension, by an index that Inductor does not see through.

    Where the last block is ragged and it sees the division, it splits the loop over `size` into
    whole blocks, and leaves the rest of the result as it was in memory (torch 2.13 and 2.14 on a
    CPU, `CppScheduling.try_loop_split`).
    """
    if length == 1:
        return factors
    block = torch.arange(size, device=factors.device) >> (length.bit_length() - 1)
    return factors.index_select(dimension, block)


def _grouped(x: Tensor, block: Block) -> Tensor:
    """[rows, columns] as [row blocks, rows of a block, column blocks, columns of a block]."""
    rows, columns = x.shape
    return x.reshape(rows // block[0], block[0], columns // block[1], block[1])
