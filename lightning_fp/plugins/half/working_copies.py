"""WorkingCopies: a module computes with 16-bit copies of float32 weights that stay the masters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy


class WorkingCopies:
    """Lends a module 16-bit copies of its float32 parameters and buffers, and takes them back.

    The copies are part of the graph: backward brings the gradients to the float32 parameters,
    which optimizers, DDP and checkpoints keep seeing. What FSDP2 shards it leaves alone, because
    that casts by itself (see `half_policy`); so it does norms with running statistics, which would
    stop moving in 16 bits.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    @property
    def lent(self) -> bool:
        """Whether copies are out."""
        return bool(self._undo)

    def lend(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Replace weights by copies until `take_back`; copies still out are taken back first."""
        self.take_back()
        copies: dict[int, Tensor] = {}  # tied weights are cast once
        for child in module.modules():
            if isinstance(child, _NormBase) and child.track_running_stats:
                continue
            both: list[dict[str, Any]] = [child._parameters, child._buffers]
            for slots in both:
                for name, tensor in slots.items():
                    if tensor is None or not _is_master(tensor):
                        continue
                    if id(tensor) not in copies:
                        sparse = getattr(child, "sparse", False) is True
                        cast = _sparse_cast if sparse else Tensor.to
                        copies[id(tensor)] = cast(tensor, dtype)
                    copy = copies[id(tensor)]
                    slots[name] = copy
                    self._undo.append(_taking_back(slots, name, tensor, copy))

    def take_back(self) -> None:
        """The float32 tensors are in their places again; buffers with what was written to them."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


def _is_master(tensor: Tensor) -> bool:
    if isinstance(tensor, DTensor) or is_lazy(tensor):
        return False
    return tensor.dtype is torch.float32


class _SparseCast(torch.autograd.Function):
    """A cast whose backward takes sparse gradients, as an embedding's can be; torch's does not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = tensor.dtype
        return tensor.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        if not grad.is_sparse:
            return grad.to(ctx.dtype), None
        values = grad._values().to(ctx.dtype)
        cast = torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=False)
        return cast, None


def _sparse_cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast: Any = _SparseCast.apply
    return cast(tensor, dtype)


def _taking_back(slots: Any, name: str, tensor: Tensor, copy: Tensor) -> Callable[[], object]:
    version = 0 if copy.is_inference() else copy._version

    def undo() -> None:
        now = slots.get(name)
        written = now is not copy or (not copy.is_inference() and copy._version != version)
        if now is not None and written and not isinstance(tensor, nn.Parameter):
            if now.shape == tensor.shape:
                with torch.no_grad():
                    tensor.copy_(now)
            else:  # a cache that has grown
                slots[name] = now.detach().float()
                return
        slots[name] = tensor

    return undo
