"""Convert a model's linear layers in place, report what happened, and take it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_fp.argument_types import checked
from lightning_fp.kernels.hardware import cuda_has_fp8
from lightning_fp.layers.backends import BackendLike, read_backend
from lightning_fp.layers.conversion.decide import (
    Conversion,
    LayerDecision,
    decide,
    why_not_convertible,
    why_not_experts,
)
from lightning_fp.layers.conversion.flops import (
    ITSELF,
    example_flops,
    flops_per_token,
    multiplies,
    size,
)
from lightning_fp.layers.conversion.report import ConversionReport, LayerReport
from lightning_fp.layers.experts.experts import (
    FPExperts,
    is_switchable_experts,
    make_plain_experts,
    make_switchable_experts,
)
from lightning_fp.layers.experts.kinds import kind_of
from lightning_fp.layers.format import FormatLike, QuantiseLike
from lightning_fp.layers.histories.auto_scaling import AutoScaling
from lightning_fp.layers.linear import (
    FPLinear,
    has_formats,
    is_plain_linear,
    is_switchable_linear,
    make_plain,
    make_switchable,
)
from lightning_fp.layers.precision_map import PrecisionMap
from lightning_fp.layers.rules import (
    clean_named_modules,
    layer_rules,
)
from lightning_fp.layers.scaling import ScalingLike, layers_quantised_like, read_scaling
from lightning_fp.layers.stored import Frozen, decide_storing, saved_bytes
from lightning_fp.layers.switchable import Gathering, SwitchableLayer
from lightning_fp.numerics import DelayedScaling


@checked
def convert(
    model: nn.Module,
    format: ScalingLike = "fp8-dynamic",
    layers: Mapping[str, FormatLike] | None = None,
    *,
    backend: BackendLike = "auto",
    fp8_eval: bool = False,
    delayed: DelayedScaling | None = None,
    frozen: Frozen = "kept",
    quantise_like: QuantiseLike | None = None,
    all_gather: Gathering = "auto",
    example_input: Any = None,
) -> ConversionReport:
    """Convert the linear layers of a model in place, for plain loops and `configure_model`.

    Parameters, hooks, tied weights and checkpoint keys stay. `model.eval()` switches to high
    precision. To change formats later, write to `report.precision_map` and call its `apply()`
    between optimizer steps.

    Args:
        model: any module; also on the meta device, also after `fully_shard`.
        format: the format of all layers that no rule and no default says otherwise of; all that
            `FP8Precision` takes as `scaling`.
        layers: `{pattern: format}`, first match wins; overrules the defaults.
        backend: "auto", "native", "torchao" or "transformer-engine".
        fp8_eval: whether evaluation runs in FP8 as well.
        delayed: how delayed scales follow from their history, also of layers that come to delayed
            scaling later.
        frozen: "stored" keeps of frozen weights in FP8 layers only their cast, a byte per element;
            see `lightning_fp.layers.stored`. Convert before an optimizer is given the Parameters.
        quantise_like: "bf16-export" casts FP8 weights from the values that their bf16 export has,
            as an inference engine does after a weight sync; None: as the formats say.
        all_gather: how FSDP2 gathers weights: "auto" in FP8 where nothing but their FP8 cast is
            used; "high" always as they are.
        example_input: arguments of one forward, to measure each layer's share of the FLOPs.

    Returns:
        The report: every layer's format, kernel and share, and why the others were left alone.

    Raises:
        ValueError: if a rule matches nothing, a backend cannot run a format, or there is nothing
            to convert.
    """
    scaling = read_scaling(format).quantised_like(quantise_like)
    backend = read_backend(backend)
    scaling.check_backend(backend)
    if delayed is not None and scaling.delayed is not None:
        raise ValueError(
            f"delayed must be None where format says how scales follow from their history, got"
            f" {delayed!r} and {scaling.delayed!r}"
        )
    conversion = Conversion(
        format=scaling.format,
        rules=layer_rules(layers_quantised_like(layers, quantise_like)),
        backend=backend,
        cuda_fp8=cuda_has_fp8(),
        frozen=frozen,
    )
    table = PrecisionMap(
        backend=backend,
        cuda_fp8=conversion.cuda_fp8,
        fp8_eval=fp8_eval,
        delayed=delayed or scaling.delayed,
        auto=AutoScaling() if scaling.auto else None,
        all_gather=all_gather,
    )
    return convert_into(table, model, conversion, example_input=example_input)


def convert_into(
    table: PrecisionMap, model: nn.Module, conversion: Conversion, *, example_input: Any = None
) -> ConversionReport:
    """Convert `model` and fill `table` with its layers; see `convert`.

    Layers that were converted before get their format anew, so the last conversion counts.
    """
    decisions = decide(model, conversion)
    storing = None
    if conversion.frozen == "stored":
        linears = {name for name, module in clean_named_modules(model) if has_formats(module)}
        resolved = {name: d.resolved for name, d in decisions.items() if name in linears}
        storing = decide_storing(model, resolved)
    switchable: dict[str, SwitchableLayer] = {}
    for name, module in clean_named_modules(model):
        if name not in decisions:
            continue
        if kind_of(module) is not None:
            switchable |= _experts(name, module, table, decisions)
        elif is_plain_linear(module):
            switchable[name] = make_switchable(module, name, table.phase)
        elif is_switchable_linear(module):
            if module.phase is not table.phase:  # another table's until now: begin anew
                module = make_switchable(make_plain(module), name, table.phase)
            switchable[name] = module
    table.fill(model, switchable, {name: decisions[name].resolved for name in switchable})
    if storing is not None:
        for name, stored in storing.formats.items():
            layer = switchable[name]
            if isinstance(layer, FPLinear):
                layer.store(stored)
    report = _report(model, table, decisions, conversion)
    if storing is not None:
        linears = [layer for layer in switchable.values() if isinstance(layer, FPLinear)]
        saved = sum(map(saved_bytes, linears))
        report = dataclasses.replace(
            report, stored=tuple(storing.formats), saved_bytes=saved, frozen_kept=storing.kept
        )
    if example_input is not None:
        report = report.with_flops(*example_flops(model, example_input))
    return report


def _experts(
    name: str, module: nn.Module, table: PrecisionMap, decisions: Mapping[str, LayerDecision]
) -> dict[str, SwitchableLayer]:
    """A module of experts, made switchable, and those of its experts that have rows of their own.

    Args:
        name: the module's.
        module: plain, or another table's until now.
        table: whose layers they become.
        decisions: by name.
    """
    if is_switchable_experts(module) and module.phase is not table.phase:
        module = make_plain_experts(module)
    if not is_switchable_experts(module):
        module = make_switchable_experts(module, name, table.phase)
    module.apart.clear()
    rows: dict[str, SwitchableLayer] = {name: module}
    for number, single in enumerate(module.expert_names()):
        if single in decisions:
            rows[single] = module.expert(number)
    return rows


@checked
def revert(model: nn.Module) -> int:
    """Turn every converted layer back into what it was, in place.

    Args:
        model: a model that `convert` or a precision plugin converted.

    Returns:
        How many layers were turned back.
    """
    converted = [module for module in model.modules() if is_switchable_linear(module)]
    for module in converted:
        make_plain(module)
    experts = [module for module in model.modules() if is_switchable_experts(module)]
    for module in experts:
        make_plain_experts(module)
    return len(converted) + len(experts)


def _report(
    model: nn.Module,
    table: PrecisionMap,
    decisions: Mapping[str, LayerDecision],
    conversion: Conversion,
) -> ConversionReport:
    """Every layer with weights to multiply, in the order of the model."""
    rows: list[tuple[LayerReport, int]] = []
    left_alone = {
        name: why_not_experts(name, module, kind, conversion)
        for name, module in clean_named_modules(model)
        if (kind := kind_of(module)) is not None
    }
    for name, module in clean_named_modules(model):
        if is_switchable_experts(module) and name in decisions:
            rows += _rows_of_experts(module, decisions)
            continue
        if is_switchable_linear(module) and name in decisions:
            format, kernel, reason = module.format.name, module.kernel.name, decisions[name].reason
        elif isinstance(module, (nn.Linear, nn.MultiheadAttention)) or multiplies(module):
            linear = isinstance(module, (nn.Linear, nn.MultiheadAttention))
            format, kernel = "high" if linear else "not linear", type(module).__name__
            reason = left_alone.get(name) or why_not_convertible(module)
        else:
            continue
        layer = LayerReport(
            name=name,
            format=format,
            kernel=kernel,
            parameters=size(module),
            flops_share=0.0,
            reason=reason,
        )
        rows.append((layer, flops_per_token(module)))
    per_token = {layer.name or ITSELF: flops for layer, flops in rows}
    per_token[""] = sum(per_token.values())
    layers = [layer for layer, _ in rows]
    whole = {id(p): 0 if is_lazy(p) else p.numel() for p in model.parameters()}
    report = ConversionReport(
        layers=layers,
        measured=False,
        parameters=sum(whole.values()),
        attention=table.attention,
        precision_map=table,
    )
    return report.with_shares(per_token)


def _rows_of_experts(
    experts: FPExperts, decisions: Mapping[str, LayerDecision]
) -> list[tuple[LayerReport, int]]:
    """A module of experts, and behind it the experts with rows of their own.

    What of the FLOPs is whose depends on the tokens: here each expert has an equal share.
    """
    parameters, flops = size(experts), flops_per_token(experts)
    count, apart = experts.shape.experts, list(experts.apart.values())
    rows: list[tuple[LayerReport, int]] = []
    for row, experts_in_row in [(experts, count - len(apart)), *((row, 1) for row in apart)]:
        layer = LayerReport(
            name=row.fqn,
            format=row.format.name,
            kernel=row.kernel.name_for_groups,
            parameters=parameters * experts_in_row // count,
            flops_share=0.0,
            reason=decisions[row.fqn].reason,
            experts=experts_in_row,
        )
        rows.append((layer, flops * experts_in_row // count))
    return rows
