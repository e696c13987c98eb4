"""FP8 options of NeMo, NeMo-Automodel, torchtitan and Accelerate, and what they are here.

Pure tables: nothing is imported from these libraries. What changes the arithmetic and has no equal
is refused; what only moves memory or time, or belongs to the strategy, is noted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_fp.choices import check_choice
from lightning_fp.format_names import TABLE
from lightning_fp.layers import Backend
from lightning_fp.numerics import DelayedScaling
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.plugins.fp8 import FP8Precision
from lightning_fp.plugins.fp16 import FP16Precision
from lightning_fp.plugins.migration.options import (
    Options,
    delayed_scaling,
    recipe_format,
    scaling_of,
)
from lightning_fp.stability.loss_scaling import LossScaling

Library = Literal["nemo", "nemo-automodel", "torchtitan", "accelerate"]

UNBOUNDED = 2.0**100
"""Megatron's and torch's loss scales may grow without bound."""


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What another library's options are here."""

    arguments: dict[str, Any]
    """Arguments of the plugin."""

    half: bool = False
    """Whether the plugin is FP16Precision, not FP8Precision."""

    notes: tuple[str, ...] = ()
    """What differs without changing the arithmetic."""

    def plugin(self) -> LayerPrecision:
        """The plugin itself."""
        return FP16Precision(**self.arguments) if self.half else FP8Precision(**self.arguments)


def from_options(
    library: Library,
    options: object,
    *,
    backend: Backend = "auto",
    blocks: Sequence[str] = (),
) -> Migration:
    """What another library's options are here.

    >>> from_options("torchtitan", {"recipe_name": "rowwise", "filter_fqns": ["output"]}).arguments
    {'scaling': 'fp8-rowwise', 'backend': 'auto', 'layers': {'*output*': 'bf16'}}

    Args:
        library: "nemo" (`MegatronMixedPrecision`), "nemo-automodel" (`FP8Config`), "torchtitan"
            (its float8 section) or "accelerate" (`TERecipeKwargs`, `FP8RecipeKwargs`,
            `AORecipeKwargs`).
        options: a mapping, or the library's object.
        backend: which kernels to use.
        blocks: patterns of the model's blocks in order, such as "*layers.0.*", for options that
            count them.

    Raises:
        ValueError: for an option that is unknown or has no equal, naming it.
    """
    tables: dict[str, Callable[[Options, Sequence[str]], Migration]] = {
        "nemo": _from_nemo,
        "nemo-automodel": _from_torchao_options,
        "torchtitan": _from_torchao_options,
        "accelerate": _from_accelerate,
    }
    check_choice("library", library, tables)
    found = tables[library](Options(library, options), blocks)
    arguments = {**found.arguments, "backend": backend}
    # In the order of the signature, for whoever prints it.
    order = ("scaling", "base", "loss_scaling", "backend", "layers", "fp8_eval")
    return dataclasses.replace(
        found, arguments={name: arguments[name] for name in order if name in arguments}
    )


def _from_nemo(options: Options, blocks: Sequence[str]) -> Migration:
    precision = str(options.take("precision", "bf16-mixed"))
    for name, usual in (
        ("params_dtype", None),
        ("pipeline_dtype", None),
        ("autocast_dtype", None),
        ("autocast_enabled", False),
        ("grad_reduce_in_fp32", True),
    ):
        options.note(name, usual, "belongs to the strategy and to base=")
    for name in ("fp8_params", "fp8_param_gather"):
        options.note(name, False, "weights stay in the dtype they have, no all-gather is in FP8")
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        options.must_be(name, False, "attention stays in the base precision")
    options.must_be("fp8_interval", 1, "scales are updated at every step")
    fp8 = options.take("fp8")
    recipe = options.take("fp8_recipe", "delayed")
    delayed = delayed_scaling(options, "fp8_", DelayedScaling(1, "most_recent"))
    high_gradient = not options.take("fp8_wgrad", True)
    layers = _first_and_last(options, blocks)
    loss_scaling = _megatron_loss_scaling(options)
    bases = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "fp32": "32-true"}
    base = bases.get(precision, precision)
    if base not in ("bf16-mixed", "16-mixed", "32-true"):
        raise options.refuse("precision", precision, "take bf16-mixed, 16-mixed or 32")
    half = {"loss_scaling": loss_scaling} if base == "16-mixed" else {}
    if fp8 is None and base == "16-mixed":
        return Migration(arguments=half, half=True, notes=options.end())
    if fp8 is None:
        high = "fp32" if base == "32-true" else "bf16"
        return Migration(arguments={"scaling": high, "base": base}, notes=options.end())
    format = recipe_format(recipe, fp8, options)
    if high_gradient:
        format = dataclasses.replace(format, grad_weight="high")
    arguments = {"scaling": scaling_of(format, delayed), "base": base, **half}
    # Megatron's FP8 context is on in evaluation too.
    arguments |= {"fp8_eval": True, **({"layers": layers} if layers else {})}
    return Migration(arguments=arguments, notes=options.end())


def _from_torchao_options(options: Options, blocks: Sequence[str]) -> Migration:
    if not options.take("enabled", True):
        return Migration(arguments={"scaling": "bf16"})
    recipe = options.take("recipe_name") or "tensorwise"
    formats = {row.torchao: row.name for row in TABLE if row.torchao}
    if recipe not in formats:
        raise options.refuse("recipe_name", recipe, f"take one of {', '.join(formats)}")
    name = "enable_fsdp_float8_all_gather"
    options.must_be(name, False, "a weight that arrives in FP8 cannot return to high precision")
    name = "precompute_float8_dynamic_scale_for_fsdp"
    options.note(name, False, "it serves the FP8 all-gather, which is not here")
    options.note("force_recompute_fp8_weight_in_bwd", False, "weights are always cast anew")
    options.note("emulate", False, "where FP8 is emulated is decided by the device")
    layers = {f"*{part}*": "bf16" for part in options.take("filter_fqns") or ()}
    arguments = {"scaling": formats[recipe], **({"layers": layers} if layers else {})}
    return Migration(arguments=arguments, notes=options.end())


def _from_accelerate(options: Options, blocks: Sequence[str]) -> Migration:
    library = str(options.take("backend", "TE")).upper()
    if library == "AO" or "config" in options:
        options.must_be("module_filter_func", None, "name layers with layers={pattern: 'bf16'}")
        options.must_be("pad_inner_dim", None, "set it in the Float8LinearConfig")
        config = options.take("config")
        options.notes.append(
            "Accelerate leaves the first and the last linear layer in high precision; the output"
            " head is left so here, for the first write layers={pattern: 'bf16'}"
        )
        scaling = "fp8-dynamic" if config is None else config
        return Migration(arguments={"scaling": scaling}, notes=options.end())
    if library not in ("TE", "NONE"):
        raise options.refuse("backend", library, "MS-AMP keeps optimizer states in FP8; take TE")
    options.must_be("interval", 1, "scales are updated at every step")
    delayed = delayed_scaling(options, "", DelayedScaling(1024, "most_recent"))
    mx = options.take("use_mxfp8_block_scaling", False)
    kind = "mxfp8" if mx else "delayed"
    format = recipe_format(kind, options.take("fp8_format") or "HYBRID", options)
    override = tuple(options.take("override_linear_precision") or (False, False, False))
    if override not in ((False, False, False), (False, False, True)):
        why = "of the three products only the weight's gradient can be in high precision"
        raise options.refuse("override_linear_precision", override, why)
    if override[2]:
        format = dataclasses.replace(format, grad_weight="high")
    fp8_eval = bool(options.take("use_autocast_during_eval", False))
    arguments = {"scaling": scaling_of(format, delayed), "fp8_eval": fp8_eval}
    return Migration(arguments=arguments, notes=options.end())


def _first_and_last(options: Options, blocks: Sequence[str]) -> dict[str, str]:
    """Rules for the blocks at both ends that stay in BF16."""
    on = options.take("first_last_layers_bf16", False)
    ends = options.take("num_layers_at_start_in_bf16"), options.take("num_layers_at_end_in_bf16")
    if not on:
        return {}
    # Megatron's own default is one at each end.
    first, last = (1 if count is None else count for count in ends)
    if len(blocks) < first + last:
        raise ValueError(
            "blocks must name the model's blocks in order where first_last_layers_bf16 is on, got"
            f" {len(blocks)}; e.g. blocks=[f'*layers.{{i}}.*' for i in range(32)]"
        )
    return {pattern: "bf16" for pattern in (*blocks[:first], *blocks[len(blocks) - last :])}


def _megatron_loss_scaling(options: Options) -> LossScaling:
    static = options.take("fp16_loss_scale")
    scaling = LossScaling(
        init_scale=float(options.take("fp16_initial_loss_scale", 2.0**32)),
        growth_interval=options.take("fp16_loss_scale_window", 1000),
        hysteresis=options.take("fp16_hysteresis", 2),
        min_scale=float(options.take("fp16_min_loss_scale", 1.0)),
        max_scale=UNBOUNDED,
    )
    return scaling if static is None else LossScaling.static(float(static))
