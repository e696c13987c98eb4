"""What a layer remembers of its operands between forward and the end of the step."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_fp.numerics import combine, nonfinite_count
from lightning_fp.numerics.combining import wide, wide_dtype

INPUT, WEIGHT, GRAD_OUTPUT = range(3)
"""Order of the operands in every tensor that has one entry per operand."""

AMAX, NONFINITE = range(2)
"""What is recorded of an operand at every step."""

SLOTS = 16
POWER = 24
"""Gradients of one leaf add up over calls, but amax must combine by max. So each call of a layer
returns its amax in a slot of its own; and since slots can be shared (the same compiled graph run
twice, or more than 16 calls), what is returned is amax**24 in float64. The root of a single one
is exact after rounding to float32, that of a sum is the maximum within 3% for two calls, on the
safe side."""


FLOAT32_POWER = 3
"""The same on MPS, which has no float64: the maximum within 26% for two calls, on the safe side, of
amaxes from 1e-12 to 1e12."""


class OperandRecord:
    """What one layer records of its operands until it is taken.

    Safe under torch.compile, inside activation checkpointing too: forward writes one tensor in
    place, and grad_output's record arrives as the gradient of `grad_leaf`, so that backward
    writes nothing.

    Args:
        operands: rows that forward records.
        width: statistics per row, the first of `lightning_fp.numerics.STATISTICS`.
        device: where the layer is.
    """

    def __init__(self, operands: int, width: int, device: torch.device) -> None:
        self.recorded = torch.zeros(operands, width, dtype=wide_dtype(device), device=device)
        """float64 [operands, width]."""
        self.grad_leaf = torch.zeros(
            SLOTS, width, dtype=wide_dtype(device), device=device, requires_grad=True
        )
        """float64 [slot, width], the amax raised to POWER: the shape of what backward returns."""
        self.calls = 0
        """Eager forwards since the last fold."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer has none: whoever takes this one in does not know of the copy."""
        return type(None), ()

    def next_slot(self) -> int:
        """The slot in which this call returns its record of grad_output."""
        if torch.compiler.is_compiling():
            return _slot_of_call_site()
        self.calls += 1
        return (self.calls - 1) % SLOTS

    @contextmanager
    def put_back(self) -> Generator[None, None, None]:
        """See `KernelMemory.put_back`."""
        recorded, calls, gradient = self.recorded.clone(), self.calls, self.grad_leaf.grad
        kept = None if gradient is None else gradient.clone()
        try:
            yield
        finally:
            self.recorded.copy_(recorded)
            if gradient is not None and kept is not None:
                gradient.copy_(kept)
            self.calls, self.grad_leaf.grad = calls, gradient

    @torch.no_grad()
    def record(self, *rows: Tensor) -> None:
        """Add one forward's rows, each [width]."""
        self.recorded.copy_(combine(self.recorded, wide(torch.stack(rows))))


@dataclass(frozen=True, kw_only=True)
class WeightCast:
    """The cast of a weight, shared by the micro-batches of one step and by their backwards.

    It knows what it was made from by identity, and not by address: weights made anew for each
    micro-batch come to lie where an earlier one lay.
    """

    weight: weakref.ref[Tensor]
    version: int
    """The weight's, which tells that it was changed in place."""

    address: int
    """The weight's: to assign to `.data` changes its values and not its version."""

    scales: Tensor
    kernel: object

    cast: Tensor
    """FP8 [out_features, in_features]."""

    scale: Tensor
    """float32 scalar."""

    amax: Tensor
    """float32 scalar; not finite if the weight is not."""

    row: Tensor
    """What each micro-batch records of the weight."""

    def still_of(self, weight: Tensor, scales: Tensor, kernel: object) -> bool:
        """Whether a cast of these would be the same."""
        return (
            self.weight() is weight
            and (self.version, self.address) == (weight._version, weight.data_ptr())
            and self.scales is scales
            and self.kernel == kernel
        )


class OperandMemory(OperandRecord):
    """The record that delayed scaling keeps at every step, and the scales that follow from it.

    Args:
        scales: float32 [3]; read-only during a step, 0 for "no scale yet".
    """

    def __init__(self, scales: Tensor) -> None:
        super().__init__(operands=2, width=2, device=scales.device)
        self.scales = scales
        self.shares_weight_cast = False
        """Whether calls of one step share the cast of the weight, in eager mode."""
        self.weight_cast: WeightCast | None = None
        self.captured = False
        """Whether a CUDA graph reads `scales` where they are."""
        self.amax_only = False
        """Whether no more is wanted than the amax of input and weight, which dynamic scaling knows
        anyway: to count what is not finite takes four times as long as the amax."""
        self.amaxes: tuple[Tensor, ...] = ()
        """Of eager forwards with `amax_only`, each a scalar, until the step takes those of all
        layers at once: a few small operations for each layer are 2% of a small model's step."""

    def on(self, device: torch.device) -> OperandMemory:
        """See `KernelMemory.on`; what was recorded stays behind."""
        if self.scales.device == device:
            return self
        there = OperandMemory(self.scales.to(device))
        there.amax_only = self.amax_only
        return there

    @override
    @contextmanager
    def put_back(self) -> Generator[None, None, None]:
        """See `OperandRecord.put_back`."""
        amaxes, cast = self.amaxes, self.weight_cast
        with super().put_back():
            try:
                yield
            finally:
                self.amaxes, self.weight_cast = amaxes, cast

    def record(self, *rows: Tensor) -> None:
        """Add one forward's rows, each [width]; with `amax_only` its amaxes, each a scalar.

        No row has a gradient.
        """
        if not self.amax_only:
            super().record(*rows)
            return
        fixed = torch.compiler.is_compiling() or (
            rows[0].is_cuda and torch.cuda.is_current_stream_capturing()
        )
        if not fixed:
            self.amaxes = tuple(map(torch.maximum, self.amaxes, rows)) if self.amaxes else rows
            return
        with torch.no_grad():
            recorded = self.recorded[:, AMAX]
            recorded.copy_(torch.maximum(recorded, wide(torch.stack(rows))))

    def weight_cast_of(self, weight: Tensor, kernel: object) -> WeightCast | None:
        """The cast kept, if it is one of this weight with these scales."""
        kept = self.weight_cast
        return kept if kept is not None and kept.still_of(weight, self.scales, kernel) else None

    def keep_weight_cast(
        self, weight: Tensor, kernel: object, cast: Tensor, scale: Tensor, amax: Tensor, row: Tensor
    ) -> None:
        """Keep a cast for the other micro-batches of the step; see `WeightCast`."""
        self.weight_cast = WeightCast(
            weight=weakref.ref(weight),
            version=weight._version,
            address=weight.data_ptr(),
            scales=self.scales,
            kernel=kernel,
            cast=cast,
            scale=scale,
            amax=amax,
            row=row,
        )


_call_sites = itertools.count()


@torch.compiler.assume_constant_result
def _slot_of_call_site() -> int:
    """A slot for each place in a compiled graph: dynamo calls this once, when it traces."""
    return next(_call_sites) % SLOTS


def _power(dtype: torch.dtype) -> int:
    return POWER if dtype is torch.float64 else FLOAT32_POWER


def amax_row(x: Tensor | None, amax: Tensor, record: bool) -> Tensor:
    """What is recorded of an operand at every step.

    Args:
        x: the operand; None where it is known to be finite.
        amax: float32 scalar, its amax.
        record: whether anybody will look.

    Returns:
        float32 [amax, non-finite count], the count only where it is recorded.
    """
    if not record:
        return amax
    return torch.stack([amax, torch.zeros_like(amax) if x is None else nonfinite_count(x)])


def in_slot(row: Tensor, slot: int) -> Tensor:
    """A gradient for `grad_leaf`: a record in its slot, zeros elsewhere."""
    row = wide(row)
    returned = torch.cat([row[:1] ** _power(row.dtype), row[1:]])
    return F.pad(returned.unsqueeze(0), (0, 0, slot, SLOTS - slot - 1))


def for_leaf(ctx: Any, row: Tensor) -> Tensor:
    """A backward's gradient for `grad_leaf`, which it was given as the last tensor of its forward.

    torch.autograd.grad(loss, inputs) and loss.backward(inputs=...) leave out the leaves that they
    were not asked for: there it is added to the leaf at once, or the next scales would clamp what
    was never recorded. Compiled code may not write here, and loses it.

    Args:
        ctx: with the call's `slot`.
        row: [width], what is recorded of grad_output.
    """
    gradient = in_slot(row, ctx.slot)
    if not torch.compiler.is_compiling():
        node = ctx.next_functions[-1][0]
        if not torch._C._will_engine_execute_node(node):
            leaf = node.variable
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
    return gradient


def from_slots(gradient: Tensor) -> Tensor:
    """The record that the gradients of a leaf add up to.

    Args:
        gradient: float64 [..., SLOTS, width].

    Returns:
        float64 [..., width].
    """
    amax = gradient[..., 0].amax(dim=-1, keepdim=True) ** (1 / _power(gradient.dtype))
    return torch.cat([amax.float().to(gradient.dtype), gradient[..., 1:].sum(dim=-2)], dim=-1)


def fold_gradients(records: Sequence[OperandRecord], into: Tensor) -> None:
    """Take the records of grad_output out of the leaves.

    Args:
        records: one per layer.
        into: float64 [layers, width], combined in place.
    """
    gradients = [record.grad_leaf.grad for record in records]
    there = [gradient for gradient in gradients if gradient is not None]
    if there:
        # Zeros for layers that did not run: an index of those that did would come from the host.
        nothing = torch.zeros_like(there[0], device=into.device)
        filled = [nothing if each is None else each.to(into.device) for each in gradients]
        into.copy_(combine(into, from_slots(torch.stack(filled))))
    for record in records:
        record.calls = 0
    empty(record.grad_leaf for record in records)


def empty(leaves: Iterable[Tensor]) -> None:
    """Have leaves without a gradient for the next step.

    On CUDA it stays where it is, and is zero: a CUDA graph's replays write to that place.
    """
    kept: list[Tensor] = []
    for leaf in leaves:
        gradient = leaf.grad
        if gradient is not None and gradient.is_cuda and not gradient.requires_grad:
            kept.append(gradient)
        else:
            leaf.grad = None
    if kept:
        torch._foreach_zero_(kept)  # pyright: ignore[reportPrivateImportUsage]
