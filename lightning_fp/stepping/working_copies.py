"""WorkingCopies: a module computes with 16-bit copies of float32 weights that stay the masters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_fp.stepping.lent_weight import LentWeight, masters_in_state


class WorkingCopies:
    """Lends a module 16-bit copies of its float32 parameters and buffers, and takes them back.

    The copies are part of the graph: backward brings the gradients to the float32 parameters,
    which optimizers, DDP and checkpoints keep seeing. What a step writes to them is written back.
    What FSDP2 shards it leaves alone, because that casts by itself (see `half_policy`); so it does
    norms with running statistics, which would stop moving in 16 bits.
    """

    def __init__(self) -> None:
        self._weights: list[LentWeight] = []
        self._undo: list[Callable[[], object]] = []

    @property
    def lent(self) -> bool:
        """Whether copies are out."""
        return bool(self._undo)

    def lend(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Replace weights by copies until `take_back`; copies still out are taken back first."""
        latest = [weight.latest for weight in self._weights]
        connected = {id(weight.master) for weight in latest if weight.connected}
        self.take_back()
        weights: dict[int, LentWeight] = {}  # tied weights are cast once
        for child in module.modules():
            if isinstance(child, _NormBase) and child.track_running_stats:
                continue
            self._lend_weights(child, dtype, weights, connected)
            self._lend_buffers(child, dtype)
        self._weights = list(weights.values())

    def _lend_weights(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        weights: dict[int, LentWeight],
        connected: Collection[int],
    ) -> None:
        slots: Any = module._parameters
        masters = {n: p for n, p in slots.items() if p is not None and _is_master(p)}
        if not masters:
            return
        to = _sparse_cast if getattr(module, "sparse", False) is True else Tensor.to
        for name, master in masters.items():
            if (key := id(master)) not in weights:
                cast = partial(_cast, to=to, dtype=dtype)
                weights[key] = LentWeight.of(master, cast, connected=key in connected)
            weights[key].put(slots, name)
            self._undo.append(partial(_restore, slots, name, master))
        hook = module._register_state_dict_hook(masters_in_state)
        self._undo.append(hook.remove)

    def _lend_buffers(self, module: nn.Module, dtype: torch.dtype) -> None:
        slots: Any = module._buffers
        for name, tensor in slots.items():
            if tensor is not None and _is_master(tensor):
                slots[name] = cast = tensor.to(dtype)
                self._undo.append(_taking_back(slots, name, tensor, cast))

    def write_back(self) -> None:
        """What was written to weights since they were lent is in the float32 ones."""
        for weight in self._weights:
            weight.write_back()

    def take_back(self) -> None:
        """The float32 tensors are in their places again, with what was written to them."""
        self.write_back()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._weights = []


def _cast(master: Tensor, *, to: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    return to(master, dtype)


def _restore(slots: dict[str, Any], name: str, master: nn.Parameter) -> None:
    """Whoever has put another Parameter there in between keeps it."""
    if isinstance(slots.get(name), LentWeight):
        slots[name] = master


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
        if now is not None and written:
            if now.shape == tensor.shape:
                with torch.no_grad():
                    tensor.copy_(now)
            else:  # a cache that has grown
                slots[name] = now.detach().float()
                return
        slots[name] = tensor

    return undo
