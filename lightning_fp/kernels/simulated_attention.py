"""Attention whose two products are in a simulated format: q k and what is made of v by its weights.

A linear layer has three products, and so has each of these: one forward, two backward. All operands
of all are rounded: query, key, the softmax's weights, value, and both gradients. Logits are made in
full, as no fused kernel would: for studies, not for speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_fp.kernels.base import compute_dtype, without_autocast
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT
from lightning_fp.kernels.simulated import SimulatedKernel


class SimulatedAttention(TorchFunctionMode):
    """While it is entered, `F.scaled_dot_product_attention` multiplies in a simulated format.

    Args:
        kernel: how operands are rounded; query and the softmax's weights as input, key and value as
            weight.
    """

    def __init__(self, kernel: SimulatedKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.entered = False
        """Whether it ever was."""
        self.met = False
        """Whether anything has called attention meanwhile."""

    @property
    def by_chance(self) -> bool:
        """Whether operands are rounded by chance."""
        return self.kernel.rounding == "stochastic"

    def __enter__(self) -> SimulatedAttention:
        self.entered = True
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.met = True
            return attention(self.kernel, *args, **(kwargs or {}))
        if func is torch.Tensor.backward and args[0].grad_fn is not None:
            return self._backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """`Tensor.backward`, which may run forwards again: those of activation checkpointing.

        It is a torch function itself, and within such a one no mode is on; from an edge of the
        graph it is none.
        """
        edge = get_gradient_edge(loss)
        with self:
            torch.autograd.backward(edge, gradient, retain_graph, create_graph, inputs=inputs)


def attention(
    kernel: SimulatedKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, its products in the kernel's format.

    Args:
        kernel: how operands are rounded.
        query: [..., heads, queries, features].
        key: [..., heads, keys, features].
        value: [..., heads, keys, features of the output].
        attn_mask: bool, True where a query may look; or what is added to the logits.
        dropout_p: share of the softmax's weights that are left out.
        is_causal: whether a query sees no later key.
        scale: of the logits; None: 1 / sqrt(features).
        enable_gqa: whether heads of key and value are shared by several of the query.

    Returns:
        [..., heads, queries, features of the output], in the dtype of attention without it.
    """
    dtype = compute_dtype(query)
    if enable_gqa:
        key, value = (
            each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3)
            for each in (key, value)
        )
    with without_autocast(query.device.type):
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        logits = _product(kernel, query.to(dtype), key.to(dtype).transpose(-1, -2)).float() * factor
        if is_causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        weights = logits.softmax(dim=-1)
        if attn_mask is not None:  # who may look nowhere sees nothing, as in torch
            weights = weights.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        return _product(kernel, weights.to(dtype), value.to(dtype)).to(dtype)


def _product(kernel: SimulatedKernel, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, in all derivatives of operands that are rounded."""
    seeds, dtype = kernel.seeds(a.device), kernel.product_dtype(a)
    x = kernel.straight_through(a, INPUT, None, dtype, seeds)
    w = kernel.straight_through(b, WEIGHT, None, dtype, seeds)
    output = x @ w
    return kernel.straight_through(output, None, GRAD_OUTPUT, output.dtype, seeds)
