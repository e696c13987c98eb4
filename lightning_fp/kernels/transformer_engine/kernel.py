"""Transformer Engine's linear layer, with the weights of ours.

Its module is built without weights (on the meta device) and is no part of the model: a layer lends
it weight and bias for the length of a call. So names, tying, sharding, hooks, master weights and
checkpoint keys stay what they are, there is no `_extra_state`, and high precision is nn.Linear
itself and not one more region of an autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_fp.format_names import TE_FORMATS
from lightning_fp.kernels.base import Kernel, compute_dtype
from lightning_fp.kernels.block import BlockKernel
from lightning_fp.kernels.derivatives import first_derivatives_only
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT
from lightning_fp.kernels.padding import whole, zeros_to
from lightning_fp.kernels.transformer_engine.library import (
    FORMATS,
    Library,
    availability,
    library,
    refusal,
    use_library,
)
from lightning_fp.kernels.transformer_engine.recipe import RecipeSettings, make_recipe, read_recipe
from lightning_fp.numerics import DelayedScaling, FloatFormat, float_format, tensor_amax

__all__ = [
    "FORMATS",
    "Engine",
    "Library",
    "RecipeSettings",
    "TransformerEngineKernel",
    "availability",
    "library",
    "make_recipe",
    "read_recipe",
    "refusal",
    "use_library",
]

_E2M1 = float_format("e2m1")

NVFP4_CASTS = BlockKernel(input=_E2M1, weight=_E2M1, grad_output=_E2M1, length=16)
"""How NVFP4 casts, for the statistics: but that its scales are rounded to e4m3, and gradients
rotated and rounded stochastically first."""


@dataclass(frozen=True, kw_only=True)
class TransformerEngineKernel(Kernel):
    """Transformer Engine under one recipe."""

    settings: RecipeSettings
    """The recipe."""

    shadow: Kernel | None
    """A kernel of ours that casts as this recipe does, for the statistics; None: there is none."""

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "Transformer Engine"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return True

    @property
    def delayed(self) -> bool:
        """Whether scales come from earlier steps."""
        return self.settings.kind == "delayed"

    def make_memory(self, layer: Any, scales: Tensor | None = None) -> Engine:
        """See `Kernel.make_memory`; delayed scales are its own."""
        shape = layer.in_features, layer.out_features, layer.bias is not None
        return Engine(*shape, layer.fqn, isinstance(layer.weight, DTensor))

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: Engine | None = None,
        *,
        evaluating: bool = False,
        **ignored: Any,
    ) -> Tensor:
        """See `Kernel.multiply`; never compiled, so a compiled model has a graph break here."""
        if memory is None:
            memory = Engine(weight.shape[1], weight.shape[0], bias is not None, layer)
        output = _eagerly(memory, self, input, weight, bias, evaluating)
        return first_derivatives_only(output, layer)

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """See `Kernel.padding`; whole blocks of tokens stand in all three products."""
        multiple = TE_FORMATS[self.settings.format].tokens
        return 3 * 2 * zeros_to(multiple, tokens) * in_features * out_features

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        if self.shadow is None:
            raise TypeError(f"the casts of {self.settings.kind} recipes are not known")
        return self.shadow.cast_of(operand, x, scales)


@dataclass
class EngineHistory:
    """What one layer keeps under delayed scaling; written by `EngineScales`."""

    cold: bool = True
    """Whether there are no scales yet. The layer then runs in high precision and is watched."""

    seen: Tensor | None = None
    """float32 [3]: amax of input, weight and grad_output since it is cold."""

    pending: dict[str, list[Tensor]] | None = None
    """Scales and history to begin with, as `reset_fp8_meta_tensors` takes them."""

    module: Any = None
    """The te.Linear that has them; None before its first call."""

    @property
    def lives(self) -> bool:
        """Whether Transformer Engine itself has the layer's scales by now."""
        return self.module is not None and self.pending is None and not self.cold


class Engine:
    """What one layer needs of Transformer Engine: a te.Linear per recipe, without weights.

    One per recipe, because a te.Linear that comes back to delayed scaling has new scales which no
    update reaches (they are registered for it once, with the first ones).

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is one.
        layer: the layer's name, for messages and for Transformer Engine's own debugging tools.
        sharded: whether FSDP2 gathers the weight for each call, so that no cast of it may be kept.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, layer: str, sharded: bool = False
    ) -> None:
        self._shape = in_features, out_features, bias
        self.layer = layer
        self.sharded = sharded
        self.history: EngineHistory | None = None
        """Set while the layer is under delayed scaling; without it scales are dynamic."""
        self._modules: dict[tuple[RecipeSettings, int], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or one in another process, begins anew: it may not share scales."""
        return Engine, (*self._shape, self.layer, self.sharded)

    def on(self, device: torch.device) -> Engine:
        """See `KernelMemory.on`; its tensors are where Transformer Engine puts them."""
        return self

    def put_back(self) -> AbstractContextManager[None]:
        """See `KernelMemory.put_back`; histories are put back together, by who advances them."""
        return nullcontext()

    def multiply(
        self,
        kernel: TransformerEngineKernel,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        evaluating: bool,
    ) -> Tensor:
        """The product; see `Kernel.multiply`, which does not let dynamo in here."""
        if input.numel() == 0 or weight.numel() == 0:
            return F.linear(input, weight, bias)
        if isinstance(weight, DTensor):
            raise ValueError(
                f"layer {self.layer!r}: its weight must be whole where it is multiplied, got a"
                " DTensor; tensor parallelism works with backend='auto', not with Transformer"
                " Engine"
            )
        input = input.to(compute_dtype(input))
        multiple = TE_FORMATS[kernel.settings.format].tokens
        tokens = input.numel() // input.shape[-1]
        if tokens % multiple:  # zeros, which are no one's amax and have no gradient
            rows = whole(input.reshape(tokens, -1), rows=multiple)
            output = self._product(kernel, rows, weight, bias, evaluating)[:tokens]
            return output.reshape(*input.shape[:-1], weight.shape[0])
        return self._product(kernel, input, weight, bias, evaluating)

    def _product(
        self,
        kernel: TransformerEngineKernel,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        evaluating: bool,
    ) -> Tensor:
        """The product, of whole blocks of tokens."""
        if kernel.delayed and self.history is not None and not evaluating:
            return self._delayed(kernel, self.history, input, weight, bias)
        engine = library()
        recipe = dynamic_recipe(kernel.settings, engine)
        with engine.region(recipe):
            return self._lend(self._module(kernel.settings, engine), input, weight, bias)

    @property
    def scales(self) -> Tensor | None:
        """See `KernelMemory.scales`."""
        if self.history is None or not self.history.lives:
            return None
        return torch.cat([scale for scale, _ in states(self.history.module)])

    def _delayed(
        self,
        kernel: TransformerEngineKernel,
        memory: EngineHistory,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        engine = library()
        if not engine.delayed_region:
            raise RuntimeError(
                f"layer {self.layer!r}: under fp8-delayed Transformer Engine must see the whole"
                " forward in one region. In a plain loop open it with `with"
                " table.forward_context():`. In activation checkpointing, which repeats the forward"
                " after its end, take transformer_engine.pytorch.checkpoint(function, ...) with a"
                " function that is not a module, or 'fp8-dynamic'"
            )
        if memory.cold:
            return _recorded(memory, input, weight, F.linear(input, weight, bias))
        module = memory.module = self._module(kernel.settings, engine)
        if memory.pending is not None:
            module.init_fp8_metadata()
            module.reset_fp8_meta_tensors(memory.pending)
            memory.pending = None
        return self._lend(module, input, weight, bias)

    def _module(self, settings: RecipeSettings, engine: Library) -> Any:
        key = settings, id(engine)
        if key not in self._modules:
            in_features, out_features, bias = self._shape
            module = engine.pytorch.Linear(
                in_features, out_features, bias=bias, device="meta", name=self.layer
            )
            # Its own look at FSDP2 goes by the module, which is not the one that was sharded.
            module._is_fsdp2 = self.sharded
            self._modules[key] = module
        return self._modules[key]

    def _lend(self, module: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parameters: dict[str, Any] = module._parameters
        kept = dict(parameters)
        parameters["weight"] = weight
        if bias is not None:
            parameters["bias"] = bias
        try:
            return module(input)
        finally:  # a gathered weight must not be kept alive from here
            parameters.update(kept)


_eagerly: Any = torch.compiler.disable(Engine.multiply)


def states(module: Any) -> list[tuple[Tensor, Tensor]]:
    """Where a te.Linear keeps scales and histories, its own tensors.

    Args:
        module: it, after its first call under delayed scaling.

    Returns:
        Of input and weight together, then of grad_output: float32 scale [k] and amax history
        [history_len, k], views.
    """
    forward, backward = module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]
    return [
        (forward.scale[:2], forward.amax_history[:, :2]),
        (backward.scale[:1], backward.amax_history[:, :1]),
    ]


def _recorded(memory: EngineHistory, input: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    """Note the amax of the operands of a call in high precision, in backward too."""
    seen = torch.zeros(3, device=input.device) if memory.seen is None else memory.seen
    seen[INPUT] = torch.maximum(seen[INPUT], tensor_amax(input))
    seen[WEIGHT] = torch.maximum(seen[WEIGHT], tensor_amax(weight))
    memory.seen = seen

    def note(gradient: Tensor) -> None:
        seen[GRAD_OUTPUT] = torch.maximum(seen[GRAD_OUTPUT], tensor_amax(gradient))

    if output.requires_grad:
        output.register_hook(note)
    return output


@cache
def dynamic_recipe(settings: RecipeSettings, engine: Library) -> Any:
    """The recipe of a layer without a history; for delayed scaling that is current scaling.

    Args:
        settings: which.
        engine: whose.
    """
    if settings.kind == "delayed":
        settings = RecipeSettings(kind="current", grad_output=settings.grad_output)
    return make_recipe(settings, DelayedScaling(), engine)
