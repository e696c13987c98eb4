"""The largest logit of attention: its growth is one way in which large learning rates end.

(Wortsman et al., arXiv 2309.14322.) Fused attention keeps its logits to itself, so those of a few
evenly spaced queries are computed again, against all keys that they may see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

QUERIES = 16
"""Queries of each head that are looked at."""


class AttentionLogits(TorchFunctionMode):
    """While it is entered, sees each call of `F.scaled_dot_product_attention`.

    Args:
        seen: is given the largest logit of each call, a scalar on its device.
    """

    def __init__(self, seen: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            with torch.no_grad():
                self._look(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.numel() and key.numel():
            self._seen(attention_logit_max(query, key, attn_mask, is_causal, scale))


def attention_logit_max(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The largest magnitude of a logit that is not masked, of some evenly spaced queries.

    Args:
        query: [..., heads, queries, features].
        key: [..., heads, keys, features]; fewer heads where they are shared.
        mask: bool, True where a query may look; or what is added to the logits.
        is_causal: whether a query sees no later key.
        scale: of the logits; None: 1 / sqrt(features).

    Returns:
        float32 scalar; NaN where nothing may be seen.
    """
    length, keys = query.shape[-2], key.shape[-2]
    step = -(-length // QUERIES)
    # The last query of each stretch: with a causal mask it sees most.
    places = torch.arange(length - 1, -1, -step, device=query.device)
    some = query.detach().index_select(-2, places).float()
    key = key.detach().float()
    if key.dim() > 2 and key.shape[-3] != some.shape[-3]:
        key = key.repeat_interleave(some.shape[-3] // key.shape[-3], dim=-3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    size = (some @ key.transpose(-1, -2) * factor).abs()
    hidden = torch.zeros((), dtype=torch.bool, device=query.device)
    if is_causal:
        hidden = torch.arange(keys, device=query.device) > places[:, None]
    if mask is not None:
        rows = mask if mask.shape[-2] == 1 else mask.index_select(-2, places)
        hidden = hidden | (~rows if rows.dtype is torch.bool else rows == -torch.inf)
    found = size.masked_fill(hidden, -1.0).amax()
    return torch.where(found < 0, torch.nan, found)
