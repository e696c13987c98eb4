"""A stand-in for Transformer Engine that multiplies on the CPU.

It has the names that `Library` uses and the rules of the real one: what a region, its nesting and
its end do to scales and histories, what a layer needs, what it refuses. The arithmetic is that of
our own kernel. `tests/te_stub/contracts.py` holds the real Python code to the same rules.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp.kernels import NativeKernel, OperandMemory
from lightning_fp.kernels.transformer_engine.library import Library
from lightning_fp.numerics import FORMATS, tensor_amax


class Format(enum.Enum):
    E4M3 = (448, 448)
    HYBRID = (448, 57344)


@dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Recipe:
    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)


@dataclasses.dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True


@dataclasses.dataclass
class Float8CurrentScaling(Recipe):
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams()
    fp8_quant_fwd_weight = QParams()
    fp8_quant_bwd_grad = QParams()


@dataclasses.dataclass
class Float8BlockScaling(Float8CurrentScaling):
    fp8_format: Format = Format.E4M3


class State:
    """FP8GlobalStateManager: one region at a time, and the buffers that delayed scaling updates."""

    enabled = False
    recipe: Any = None
    first = False
    depth = 0
    forward_updates = 0
    backward_updates = 0
    delayed: list[Linear] = []  # noqa: RUF012 (one for the process, as there)

    @classmethod
    def reset(cls) -> None:
        cls.enabled, cls.recipe, cls.first, cls.depth = False, None, False, 0
        cls.forward_updates = cls.backward_updates = 0
        cls.delayed = []

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls.recipe

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        first, cls.first = cls.first, False
        return first

    @classmethod
    def update(cls, *, forward: bool) -> None:
        if forward:
            cls.forward_updates += 1
        else:
            cls.backward_updates += 1
        for module in cls.delayed:
            module.update(forward=forward)


class autocast:  # noqa: N801 (its name there)
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
    ) -> None:
        self.enabled, self.recipe = enabled, recipe

    def __enter__(self) -> autocast:
        self.before = State.enabled, State.recipe, State.first
        State.enabled, State.recipe = self.enabled, self.recipe
        if State.depth == 0:
            State.first = True
        State.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        State.enabled, State.recipe, State.first = self.before
        State.depth -= 1
        if self.enabled and State.depth == 0 and torch.is_grad_enabled():
            State.update(forward=True)


class Linear(nn.Module):
    """te.Linear: has weights of its own, state in `fp8_meta`, and multiplies as the region says."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = "cpu",
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device)) if bias else None
        )
        self.fp8_meta: dict[str, Any] = {}

    def get_extra_state(self) -> Tensor:
        raise AssertionError("the state of a layer must not be asked of Transformer Engine")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        recipe = State.recipe
        if not (State.enabled and recipe.delayed()) or "scaling_fwd" in self.fp8_meta:
            return
        for key, size in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[key] = types.SimpleNamespace(
                recipe=recipe,
                scale=torch.ones(size),
                amax_history=torch.zeros(recipe.amax_history_len, size),
            )

    def reset_fp8_meta_tensors(self, tensors: dict[str, list[Tensor]]) -> None:
        for key, (scale, history) in tensors.items():
            self.fp8_meta[key].scale.copy_(scale)
            self.fp8_meta[key].amax_history.copy_(history)

    def update(self, *, forward: bool) -> None:
        state = self.fp8_meta["scaling_fwd" if forward else "scaling_bwd"]
        recipe, history = state.recipe, state.amax_history
        amax = history.amax(0) if recipe.amax_compute_algo == "max" else history[0].clone()
        history.copy_(torch.roll(history, -1, 0))
        history[0] = 0
        limit = recipe.fp8_format.value[0 if forward else 1]
        scale = limit / amax / 2.0**recipe.margin
        known = (amax > 0) & torch.isfinite(amax)
        state.scale.copy_(torch.where(known, scale, state.scale))

    def forward(self, input: Tensor) -> Tensor:
        if not State.enabled:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        tokens = input.numel() // input.shape[-1]
        if tokens % 8 or input.shape[-1] % 16 or self.weight.shape[0] % 8:
            raise ValueError("FP8 execution requires the product of all dimensions ...")
        self.init_fp8_metadata()
        recipe = State.recipe
        hybrid = recipe.fp8_format is Format.HYBRID
        kernel = NativeKernel(
            grad_output=FORMATS["e5m2" if hybrid else "e4m3"], delayed=recipe.delayed()
        )
        updates = State.is_first_fp8_module()
        memory = None
        if recipe.delayed():
            if self not in State.delayed:
                State.delayed.append(self)
            forward, backward = self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"]
            memory = OperandMemory(torch.cat([forward.scale[:2], backward.scale[:1]]))
            seen = torch.stack([tensor_amax(input), tensor_amax(self.weight), torch.zeros(())])
            torch.maximum(forward.amax_history[0], seen, out=forward.amax_history[0])
        output = kernel.multiply(
            input, self.weight, self.bias, self.name or "", memory, record=False
        )
        if output.requires_grad:
            output.register_hook(self._saw_gradient(recipe.delayed()))
            if updates:  # the first layer's backward is the last of the step
                output.grad_fn.register_hook(lambda *_: State.update(forward=False))
        return output

    def _saw_gradient(self, delayed: bool) -> Any:
        def hook(gradient: Tensor) -> None:
            if delayed:
                row = self.fp8_meta["scaling_bwd"].amax_history[0]
                row[0] = torch.maximum(row[0], tensor_amax(gradient))

        return hook


def _yes(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


def _no(return_reason: bool = False) -> Any:
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution."
    return (False, reason) if return_reason else False


def fake_library(**changes: Any) -> Library:
    """It, with nothing remembered of earlier ones."""
    State.reset()
    pytorch = types.SimpleNamespace(
        Linear=Linear,
        autocast=autocast,
        is_fp8_available=_yes,
        is_fp8_block_scaling_available=_yes,
        is_mxfp8_available=_no,
    )
    for name, value in changes.items():
        setattr(pytorch, name, value)
    recipes = types.SimpleNamespace(
        Format=Format,
        QParams=QParams,
        DelayedScaling=DelayedScaling,
        Float8CurrentScaling=Float8CurrentScaling,
        Float8BlockScaling=Float8BlockScaling,
    )
    return Library(pytorch=pytorch, recipes=recipes, state=State, version="fake", device="cpu")
