"""What FP16 training cannot work with, refused before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn import Module
from torch.optim import Optimizer

from lightning_fp.argument_types import checked
from lightning_fp.numerics import float_format
from lightning_fp.stepping.gradients import calls_closure_itself

_HALF = (torch.float16, torch.bfloat16)


@checked
def half_policy(dtype: torch.dtype = torch.float16) -> MixedPrecisionPolicy:
    """What to give FSDP2's `fully_shard`: FP16 weights and compute, float32 masters and gradients.

    >>> half_policy().reduce_dtype
    torch.float32

    Args:
        dtype: of weights while they are gathered, and of what is computed with them.
    """
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def check_weights(module: Module) -> None:
    """Refuse to train weights of 16 bits.

    Raises:
        ValueError: naming some of them.
    """
    half = [n for n, p in module.named_parameters() if p.requires_grad and p.dtype in _HALF]
    if half:
        smallest = float_format("fp16").smallest_subnormal
        raise ValueError(
            f"trained parameters must be float32 with FP16, got 16 bits for {', '.join(half[:3])}"
            f" ({len(half)} in all); call model.float() first. The float32 weights are the masters:"
            " in FP16 most updates would be lost in rounding, and Adam's eps (1e-8 by default) is"
            f" below the least number, {smallest:.1e}, so that it divides by zero"
        )


def check_sharding(module: Module, base: str) -> None:
    """Refuse FSDP2 policies under which gradients would be reduced in 16 bits.

    Raises:
        ValueError: for such a policy, or for none where the base is "16-true".
    """
    for child in module.modules():
        if not isinstance(child, FSDPModule):
            continue
        policy: Any = child._get_fsdp_state()._mp_policy
        reduced = policy.reduce_dtype or policy.param_dtype
        if reduced is not None and reduced in _HALF:
            raise ValueError(
                f"fully_shard must reduce gradients in float32 with FP16, got {reduced}; pass"
                " mp_policy=lightning_fp.half_policy()"
            )
        if base == "16-true" and policy.param_dtype is not torch.float16:
            raise ValueError(
                "fully_shard must gather weights in float16 with base '16-true', got"
                f" {policy.param_dtype}; pass mp_policy=lightning_fp.half_policy()"
            )


def check_switchable(module: Module) -> None:
    """Refuse a model that FSDP2 gathers in 16 bits: its dtype cannot change while the run goes on.

    Raises:
        ValueError: naming the alternative.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            policy: Any = child._get_fsdp_state()._mp_policy
            if policy.param_dtype in _HALF:
                raise ValueError(
                    f"fully_shard must gather weights in float32 where PrecisionFallback is to turn"
                    f" FP16 into bf16, got {policy.param_dtype}; leave mp_policy out, and autocast"
                    " (base='16-mixed') computes in FP16"
                )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that call their closure themselves, such as LBFGS, and none at all.

    Args:
        optimizers: of a fit; empty where nothing is to be trained.

    Raises:
        ValueError: naming the optimizer.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if optimizers and not any(group["params"] for group in groups):
        raise ValueError(
            "configure_optimizers must return an optimizer with FP16, got none: gradients have the"
            " loss scale in them until it steps, and whoever steps otherwise would apply it; return"
            " the optimizer, or train in bf16"
        )
    for optimizer in optimizers:
        if calls_closure_itself(optimizer):
            raise ValueError(
                f"optimizer must not be {type(optimizer).__name__} with FP16: it evaluates the loss"
                " several times in a step, between which no loss scale could be taken out; train"
                " in bf16, or use another optimizer"
            )


def sees_scaled_gradients(module: Module) -> str:
    """A line where somebody takes gradients before the loss scale is out of them; else "".

    Args:
        module: with the hooks it has where a backward begins.
    """
    hooked = [n for n, p in module.named_parameters() if p._post_accumulate_grad_hooks]
    if not hooked:
        return ""
    return (
        f"post-accumulate-grad hooks, as {hooked[0]} has, see gradients with the FP16 loss scale in"
        " them: an optimizer that steps there applies the scale too; let it step after backward, or"
        " train in bf16"
    )
