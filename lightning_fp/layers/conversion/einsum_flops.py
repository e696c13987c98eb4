"""An einsum counts as it is written: all of its indices multiply.

torch sums an index that one operand alone has before it multiplies, `e` of "btd,edh->bth", and its
counter sees what is left. NumPy's `einsum_path`, and with it DeepSpeed's profiler, count what the
author wrote, as is done here for the other modules that multiply in an operator of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class EinsumAsWritten(TorchFunctionMode):
    """While it is entered, adds up what torch's count of each einsum leaves out.

    Args:
        count: FLOPs that torch has counted so far.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        super().__init__()
        self.left_out = 0
        self._count = count

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._count() if func is torch.einsum else 0
        result = func(*args, **(kwargs or {}))
        if func is torch.einsum and isinstance(args[0], str):
            operands = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            counted = self._count() - before
            self.left_out += counted * (summed_before(args[0], operands) - 1)
        return result


def summed_before(equation: str, operands: Sequence[Tensor]) -> int:
    """The product of the indices that torch sums before it multiplies.

    >>> summed_before("btd,edh->bth", [torch.ones(2, 3, 4), torch.ones(8, 4, 5)])
    8
    >>> summed_before("...d,dh", [torch.ones(2, 3, 4), torch.ones(4, 5)])
    1

    Args:
        equation: of `torch.einsum`.
        operands: what it multiplies; three and more are multiplied two at a time, and count 1.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    indices = inputs.split(",")
    if not arrow or len(indices) != 2:  # what appears once is in an output that is not written
        return 1
    alone = set(indices[0]) ^ set(indices[1])
    return math.prod(
        size
        for names, operand in zip(indices, operands, strict=True)
        for name, size in _sizes(names, operand.shape).items()
        if name in alone and name not in output
    )


def _sizes(names: str, shape: Sequence[int]) -> dict[str, int]:
    """Of each index of one operand; what an ellipsis stands for has none."""
    before, _, after = names.partition("...")
    sizes = dict(zip(before, shape, strict=False))
    return sizes | dict(zip(reversed(after), reversed(shape), strict=False))
