"""How sharp the loss is in its logits, in closed form; and how heavy the tails of a tensor are.

Sharpness asks how far the loss can be raised by small changes of what it is a function of (Keskar
et al., arXiv 1609.04836). Of the weights that is a search. Of the logits it is none: cross-entropy
falls in the logit of the target and rises in all others, so within a box the worst point is a
corner, and which one is known. It takes one pass over the vocabulary; arXiv 2405.18710 has it as an
early sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-3
"""Half-width of the box, relative to a logit's size plus one (Keskar et al. take 1e-3 and 5e-4)."""


_LARGE = 30.0
"""Changes whose exponential is still far from float32's limit."""


def logit_sharpness(logits: Tensor, targets: Tensor, epsilon: float = EPSILON) -> Tensor:
    """100 (max L - L) / (1 + L), of the cross-entropy L of each row.

    The maximum is over |d| <= epsilon (|logit| + 1).

    Args:
        logits: [rows, classes], any floating-point dtype.
        targets: int64 [rows].
        epsilon: half-width of the box.

    Returns:
        float32 [rows], not negative.
    """
    logits = logits.float()
    reach = epsilon * (logits.abs() + 1)
    place = targets.unsqueeze(-1)
    log_p = logits.log_softmax(dim=-1)
    change = reach.scatter(-1, place, -reach.gather(-1, place))
    # Against the target's own change all others go up: a sum without cancellation, where the
    # difference of two losses would be lost in float32.
    up = change - change.gather(-1, place)
    small = torch.log1p((log_p.exp() * torch.expm1(up)).sum(dim=-1))
    rise = torch.where(up.amax(dim=-1) < _LARGE, small, (log_p + up).logsumexp(dim=-1))
    loss = -log_p.gather(-1, place).squeeze(-1)
    return 100 * rise / (1 + loss)


def kurtosis(x: Tensor) -> Tensor:
    """Mean fourth power over the squared mean square, about zero.

    3 of a normal distribution, n where one of n values has it all: arXiv 2505.20524 follows
    outliers by it.

    Args:
        x: any shape, not empty.

    Returns:
        float32 scalar; NaN where all is 0 or something is not finite.
    """
    size = x.detach().float().abs()
    square = (size / size.amax()).square()  # so that no fourth power leaves float32
    return square.square().mean() / square.mean().square()
