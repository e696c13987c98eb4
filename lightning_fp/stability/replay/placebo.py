"""A placebo: a change of the weights so small that it is none, to see what chaos alone does.

At a high learning rate two runs part for whatever reason: at 0.1 high precision ended 2.10% lower,
and the run's own formats from weights moved by one part in 512 ended 2.02% lower. Under a fault it
was 65% and 0.5%.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SIZE = 2.0**-9
"""Of the change, as a share of each weight: about what rounding to bfloat16 does."""


@torch.no_grad()
def perturb_(tensors: Iterable[Tensor], *, seed: int, size: float = SIZE) -> None:
    """Move each weight by a normal random share of itself, in place.

    The global generators stay where they are, and copies on several ranks move alike.

    Args:
        tensors: weights of any shape and dtype; integers are left alone.
        seed: of the shares.
        size: their standard deviation.
    """
    # On the CPU, whose numbers are the same for every device.
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore
        if own.is_sparse or not (own.is_floating_point() or own.is_complex()):
            continue
        shares = torch.randn(own.shape, generator=generator).to(own.device)
        own.mul_(1 + size * shares)
