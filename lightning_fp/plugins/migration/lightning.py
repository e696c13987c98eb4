"""From Lightning's precision plugins, and from other libraries' options, to ours."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision

from lightning_fp.format_names import TE_FORMATS
from lightning_fp.layers import Backend
from lightning_fp.numerics import DelayedScaling
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.plugins.fp8 import FP8Precision
from lightning_fp.plugins.fp16 import FP16Precision
from lightning_fp.plugins.migration.libraries import UNBOUNDED
from lightning_fp.plugins.migration.options import (
    Options,
    delayed_scaling,
    recipe_format,
    scaling_of,
)
from lightning_fp.stability.loss_scaling import LossScaling

_RECIPE_CLASSES = {names.recipe: names.megatron for names in TE_FORMATS.values()}


def from_lightning(plugin: Precision, *, backend: Backend = "auto") -> LayerPrecision:
    """Our plugin for one of Lightning's.

    >>> from_lightning(MixedPrecision("bf16-mixed", "cpu")).precision
    'bf16-mixed'

    Args:
        plugin: `TransformerEnginePrecision`, `MixedPrecision`, `HalfPrecision` or `Precision`;
            one of ours is returned as it is.
        backend: which kernels to use; "transformer-engine" for the same library as before.

    Raises:
        ValueError: for a plugin, or an option of it, that has no equal.
    """
    if isinstance(plugin, LayerPrecision):
        return plugin
    name = type(plugin).__name__
    if name == "TransformerEnginePrecision":
        return _from_transformer_engine(plugin, backend)
    if type(plugin) is MixedPrecision:
        if plugin.precision == "bf16-mixed":
            return FP8Precision("bf16", backend=backend)
        return FP16Precision(loss_scaling=_torch_loss_scaling(plugin.scaler), backend=backend)
    if type(plugin) is HalfPrecision:
        if plugin.precision == "bf16-true":
            return FP8Precision("bf16", base="bf16-true", backend=backend)
        return FP16Precision("16-true", backend=backend)
    if type(plugin) is Precision:
        return FP8Precision("fp32", base="32-true", backend=backend)
    why = {
        "FSDPPrecision": "take ModelParallelStrategy (FSDP2) with FP8Precision",
        "DoublePrecision": "no format here has 64 bits",
        "BitsandbytesPrecision": "its weights are quantized for inference and adapters",
        "DeepSpeedPrecision": "DeepSpeed casts by itself; take DDP or ModelParallelStrategy",
        "XLAPrecision": "XLA casts by itself; it stays as it is",
    }.get(name, "take FP8Precision or FP16Precision with the options you need")
    raise ValueError(f"plugin {name} has no equal here; {why}")


def _from_transformer_engine(plugin: Any, backend: Backend) -> LayerPrecision:
    """Lightning's plugin for Transformer Engine: delayed scaling, as its recipe says."""
    if plugin.replace_layers is False:
        raise ValueError(
            "plugin TransformerEnginePrecision(replace_layers=False) has no equal here: layers of"
            " Transformer Engine in the model stay what they are; build it with nn.Linear"
        )
    recipe, options = plugin.recipe, Options("Transformer Engine", plugin.recipe)
    kind = _RECIPE_CLASSES.get(type(recipe).__name__, "delayed")
    format = recipe_format(kind, getattr(recipe.fp8_format, "name", "HYBRID"), options)
    history = delayed_scaling(options, "", DelayedScaling(1024))
    for name in ("fp8_dpa", "fp8_mha"):
        if getattr(recipe, name, False):
            raise options.refuse(name, True, "attention stays in the base precision")
    dtypes = plugin.weights_dtype, plugin.fallback_compute_dtype
    weights, compute = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    bases: dict[tuple[str, str], Any] = {
        ("bfloat16", "bfloat16"): "bf16-true",
        ("float32", "bfloat16"): "bf16-mixed",
        ("float32", "float16"): "16-mixed",
        ("float32", "float32"): "32-true",
    }
    if (weights, compute) not in bases:
        raise ValueError(
            "plugin TransformerEnginePrecision must have float32 or bfloat16 weights, got"
            f" {weights} computing in {compute}; FP8Precision(base='16-mixed') keeps float32"
            " weights and scales the loss, which this one did not"
        )
    # Lightning's plugin leaves FP8 on in evaluation.
    base = bases[weights, compute]
    scaling = scaling_of(format, history)
    return FP8Precision(scaling, base=base, backend=backend, fp8_eval=True)


def _torch_loss_scaling(scaler: Any) -> LossScaling:
    """How a torch GradScaler moves its scale."""
    if scaler is None:
        return LossScaling()
    if not scaler.is_enabled():
        return LossScaling.static(1.0)
    return LossScaling(
        init_scale=float(scaler.get_scale()),
        growth_interval=scaler.get_growth_interval(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        hysteresis=1,
        min_scale=1 / UNBOUNDED,
        max_scale=UNBOUNDED,
    )
