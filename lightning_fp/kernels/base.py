"""What a kernel is: one way to multiply a linear layer in one format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_fp.format_names import Rounding
from lightning_fp.kernels.gathered_casts import KeptCasts
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.numerics import FloatFormat


class KernelMemory(Protocol):
    """What a kernel keeps of one layer between calls; the layer holds it and looks no further."""

    @property
    def scales(self) -> Tensor | None:
        """Of input, weight and grad_output under delayed scaling, float32 [3]; None: none yet."""
        ...

    def on(self, device: torch.device) -> KernelMemory:
        """Itself, or its like on another device."""
        ...

    def put_back(self) -> AbstractContextManager[None]:
        """Record within as usual, and leave no trace of it; all stays at its address."""
        ...


@runtime_checkable
class Kernel(Protocol):
    """Computes `input @ weight.T + bias` and its gradients in one format.

    Kernels are immutable, compare by value and hold no tensors, so that layers of equal format
    share compiled code. What has to be kept of a layer from call to call is its memory. A kernel
    to which every call is the first leaves `make_memory` as it is here.
    """

    records: ClassVar[bool] = False
    """Whether it can record in a memory what it casts, whatever scales it by."""

    every_derivative: ClassVar[bool] = False
    """Whether torch.func's transforms and forward-mode derivatives see through it. For the others
    there is `lightning_fp.kernels.straight_through`."""

    rounding: Rounding = "nearest"
    """How its casts round."""

    @property
    def name(self) -> str:
        """What runs, in the words of the conversion report, e.g. "native (emulated)"."""
        ...

    @property
    def name_for_groups(self) -> str:
        """Likewise where it multiplies for the experts of a mixture."""
        return f"{self.name}, one expert after the other"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """Whether CUDA tensors are multiplied by FP8 tensor cores; the CPU never does."""
        ...

    def make_memory(self, layer: Any, scales: Tensor | None = None) -> KernelMemory | None:
        """What it has to keep of a layer; None: nothing.

        Args:
            layer: the layer, with fqn, in_features, out_features, weight and bias.
            scales: float32 [3], where somebody keeps delayed scales for the layer.
        """
        return None

    def takes_stored(self, format: FloatFormat) -> bool:
        """Whether it multiplies with a `StoredWeight` of this format without making its values.

        That takes one cast of the weight, with one scale, for all products of the layer.
        """
        return False

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, layer: str) -> Tensor:
        """The product, of a layer of which nothing is kept.

        Args:
            input: [..., in_features], any leading dimensions, possibly empty.
            weight: [out_features, in_features].
            bias: [out_features] or None.
            layer: the layer's name, for error messages.

        Returns:
            [..., out_features] in the autocast dtype if autocast is on, else in `input.dtype`.
        """
        return self.multiply(input, weight, bias, layer)

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: Any = None,
        *,
        record: bool = False,
        evaluating: bool = False,
        gathered: KeptCasts | None = None,
    ) -> Tensor:
        """The product, of a layer of which something may be kept.

        A kernel names those of the last three that it has a use for.

        Args:
            input: as `__call__`.
            weight: as `__call__`.
            bias: as `__call__`.
            layer: as `__call__`.
            memory: what this kernel, or another that the layer comes back to, keeps of the layer;
                None: nothing.
            record: whether a memory records the operands of this call.
            evaluating: whether amaxes of this call must not reach a history.
            gathered: what is kept of the casts of a weight that FSDP2 has gathered.

        Returns:
            As `__call__`.
        """
        ...

    def multiply_groups(
        self,
        input: Tensor,
        weight: Tensor,
        groups: Groups,
        layer: str,
        gathered: KeptCasts | None = None,
    ) -> Tensor:
        """The products of a mixture's experts.

        Here one expert after the other, each as a layer of its own; a GPU's host waits for their
        sizes.

        Args:
            input: [tokens, in_features], sorted by expert.
            weight: [experts, out_features, in_features].
            groups: whose the rows of `input` are.
            layer: the layer's name, for error messages.
            gathered: what is kept of the casts of a weight that FSDP2 has gathered.

        Returns:
            [tokens, out_features], as `__call__`; 0 for rows of nobody.
        """
        input = input.to(compute_dtype(input))
        sizes = groups.sizes()
        parts = input[: sum(sizes)].split(sizes)
        multiplied: list[Tensor] = []
        for expert, (x, w) in enumerate(zip(parts, weight.unbind(0), strict=True)):
            if x.numel() > 0:
                kept = None if gathered is None else gathered.part(weight, expert)
                multiplied.append(self.multiply(x, w, None, layer, gathered=kept))
        nobody = input.new_zeros(input.shape[0] - sum(sizes), weight.shape[1])
        return torch.cat([*multiplied, nobody])

    def exported(self, weight: Tensor) -> Tensor:
        """What of a weight is cast: itself, or what its bf16 export leaves of it.

        Args:
            weight: any shape.

        Returns:
            Its values, in whatever dtype holds them.
        """
        return weight

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """FLOPs of forward and backward that FP8 hardware spends on the zeros of `whole`.

        Args:
            tokens: product of the input's leading dimensions.
            in_features: columns of the weight.
            out_features: rows of the weight.
        """
        return 0

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """How an operand is cast, for the statistics.

        Args:
            operand: INPUT, WEIGHT or GRAD_OUTPUT, see `lightning_fp.kernels.memory`.
            x: [rows, columns], the operand.
            scales: the layer's delayed scales, if it has any.

        Returns:
            The scale (float32, scalar or [rows, 1]) and the format of the cast.
        """
        ...


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype nn.Linear would compute in here: autocast's if it is on, else the input's."""
    device = input.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Turn autocast off where it is on: inside a kernel every dtype is chosen by hand.

    While compiling it is turned off in any case: a backward is traced under the autocast of its
    forward, which the state at this moment does not show.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
