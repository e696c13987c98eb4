"""Which format each layer gets, decided before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_fp.choices import check_choice
from lightning_fp.format_names import ALIGNMENT
from lightning_fp.kernels.cost.data_sheets import DataSheet
from lightning_fp.kernels.cost.linear import TOKENS, gains
from lightning_fp.kernels.hardware import check_alignment
from lightning_fp.layers.backends import Backend, Resolved, read_backend, resolve
from lightning_fp.layers.conversion.casting import casting_of
from lightning_fp.layers.conversion.flops import CONVOLUTIONS, multiplies
from lightning_fp.layers.experts.experts import why_experts_stay
from lightning_fp.layers.experts.kinds import ExpertsKind, ExpertsShape, kind_of, shape_of
from lightning_fp.layers.experts.rows import NAME, without_history
from lightning_fp.layers.format import NAMED_FORMATS, LinearFormat
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.layers.linear import (
    CAST_DTYPES,
    first_parameter,
    has_formats,
    is_plain_linear,
    why_it_stays,
)
from lightning_fp.layers.rules import (
    Rule,
    Sized,
    check_rules_apply,
    clean_named_modules,
    default_exclusion,
    narrow_adapter,
)
from lightning_fp.layers.stored import Frozen
from lightning_fp.layers.transformer_engine.setup import check_model
from lightning_fp.shown import a_kind


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert, and to what."""

    format: LinearFormat
    """The format of the layers that no rule names."""

    rules: tuple[Rule, ...] = ()
    """The user's rules, in order; the first match wins."""

    backend: Backend = "auto"
    """Which kernels to use."""

    high_precision: LinearFormat = NAMED_FORMATS["high"]
    """The format of the layers that the defaults leave in high precision."""

    cuda_fp8: bool = False
    """Whether CUDA tensors can go to FP8 tensor cores."""

    frozen: Frozen = "kept"
    """What is kept of frozen weights in FP8 layers."""

    card: DataSheet | None = None
    """For which card it is predicted whether a layer gains; None: for H100, of which most is
    known."""

    tokens: int = TOKENS
    """Tokens of a micro-batch, likewise."""

    def __post_init__(self) -> None:
        check_choice("frozen", self.frozen, get_args(Frozen))

    def resolve(self, format: LinearFormat) -> Resolved:
        """A format with what multiplies it here.

        Raises:
            ValueError: if the backend cannot run it.
        """
        return resolve(format, self.backend, cuda_fp8=self.cuda_fp8)


_ROUTER = re.compile(r"Router|Gate|Gating")
_LAZY = "its size is unknown before its first batch; run one forward before the conversion"


@dataclass(frozen=True, kw_only=True)
class LayerDecision:
    """One layer's format and kernel, and the reason if it is high precision."""

    resolved: Resolved
    reason: str | None
    by_default: bool = False
    """Whether a default, not the user, chose high precision."""

    @property
    def format(self) -> LinearFormat:
        """The layer's format."""
        return self.resolved.format


def decide(model: nn.Module, conversion: Conversion) -> dict[str, LayerDecision]:
    """Which format each linear layer gets, without changing anything.

    Returns:
        A decision for every layer whose format can change, by name.

    Raises:
        ValueError: as `convert`.
    """
    read_backend(conversion.backend)
    linears: dict[str, nn.Linear] = {}
    experts: dict[str, ExpertsShape] = {}
    fixed: dict[str, str] = {}
    multiplying: dict[str, str] = {}
    other_dtypes: list[str] = []
    for name, module in clean_named_modules(model):
        if has_formats(module):
            linears[name] = module
            continue
        reason = why_not_convertible(module)
        kind = kind_of(module)
        if kind is not None:
            reason = why_not_experts(name, module, kind, conversion)
            if reason is None:
                experts |= named_experts(name, shape_of(module, kind), conversion.rules)
                continue
        fixed[name] = reason
        if multiplies(module):
            multiplying[name] = fixed[name]
        if is_plain_linear(module) and module.weight.dtype not in CAST_DTYPES:
            other_dtypes.append(name)  # a rule may name them: it then has no effect
    check_rules_apply(conversion.rules, [*linears, *experts, *other_dtypes], fixed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decisions = {
        name: _decide_one(name, linear, conversion, tied=id(first_parameter(linear)) in embeddings)
        for name, linear in linears.items()
    }
    for name, shape in experts.items():
        decisions[name] = _decide_one(name, shape, conversion, tied=False)
    _check_something_to_do(decisions, multiplying)
    if conversion.backend == "transformer-engine":
        _check_transformer_engine(model, conversion.backend, decisions)
    return decisions


def _check_transformer_engine(
    model: nn.Module, backend: Backend, decisions: Mapping[str, LayerDecision]
) -> None:
    low = {name: d.resolved for name, d in decisions.items() if not d.format.is_high_precision}
    for each in dict.fromkeys(low.values()):
        if (refusal := each.refusal) is not None:
            raise ValueError(
                f"format {each.format.name!r} cannot run with backend {backend!r}: {refusal}"
            )
    if low:
        check_model(model, [name for name, low in low.items() if low.format.scaling == "delayed"])


def _decide_one(
    name: str, linear: nn.Linear | ExpertsShape, conversion: Conversion, *, tied: bool
) -> LayerDecision:
    for rule in conversion.rules:
        if rule.matches(name):
            chosen = conversion.resolve(_taken(linear, rule.format))
            narrow = narrow_adapter(name, linear) if rule.format.is_fp8 else None
            if narrow is not None:
                high = conversion.resolve(conversion.high_precision)
                return LayerDecision(resolved=high, reason=narrow, by_default=True)
            _check_runs(name, linear, chosen)
            high = rule.format.is_high_precision
            reason = f"rule {rule.pattern!r}: {rule.format.name!r}" if high else None
            return LayerDecision(resolved=chosen, reason=reason)
    chosen = conversion.resolve(_taken(linear, conversion.format))
    if chosen.format.is_high_precision:
        return LayerDecision(resolved=chosen, reason="the format of the run")
    too_small = chosen.kernel.runs_on_fp8_hardware and _too_small(linear, chosen.format, conversion)
    # Emulated blocks may be ragged: only hardware leaves such layers alone by default.
    multiple = max(chosen.alignment, ALIGNMENT)
    if _is_lazy(linear) and chosen.kernel.runs_on_fp8_hardware:
        reason = _LAZY
    else:
        reason = default_exclusion(name, linear, tied=tied, too_small=too_small, multiple=multiple)
    if reason is not None:
        high = conversion.resolve(conversion.high_precision)
        return LayerDecision(resolved=high, reason=reason, by_default=True)
    return LayerDecision(resolved=chosen, reason=None)


def _taken(layer: nn.Linear | ExpertsShape, format: LinearFormat) -> LinearFormat:
    """What a layer makes of a format: experts keep no history."""
    return without_history(format) if isinstance(layer, ExpertsShape) else format


def _is_lazy(layer: nn.Linear | ExpertsShape) -> bool:
    return isinstance(layer, nn.Linear) and is_lazy(first_parameter(layer))


def _too_small(linear: Sized, format: LinearFormat, conversion: Conversion) -> bool:
    """Whether FP8 is predicted to gain nothing on a layer whose size is known."""
    casting = casting_of(format, str(conversion.backend))
    shape = linear.in_features, linear.out_features
    if casting is None or 0 in shape:
        return False
    return not gains(casting, *shape, card=conversion.card, tokens=conversion.tokens)


def _check_runs(name: str, linear: nn.Linear | ExpertsShape, chosen: Resolved) -> None:
    """An explicit rule overrules the defaults, but not the hardware."""
    if _is_lazy(linear) and chosen.kernel.runs_on_fp8_hardware:
        raise ValueError(f"layer {name!r} cannot run {chosen.format.name!r}: {_LAZY}")
    check_alignment(
        name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        multiple=chosen.alignment,
    )


def _check_something_to_do(
    decisions: Mapping[str, LayerDecision], multiplying: Mapping[str, str]
) -> None:
    """Refuse a model in which nothing would change.

    Args:
        decisions: of the layers whose format can change.
        multiplying: the modules that multiply otherwise, with the reason why theirs cannot.
    """
    shown = [f"{name or '(the model itself)'}: {why}" for name, why in multiplying.items()]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    alone = f"; left alone: {'; '.join(shown[:4])}{more}" if shown else ""
    if not decisions:
        raise ValueError(
            "nothing to convert: the model has no nn.Linear layer that could change its format"
            + alone
            + "; train it without this plugin, e.g. with precision='bf16-mixed'"
        )
    if all(decision.reason is not None for decision in decisions.values()) and any(
        decision.by_default for decision in decisions.values()
    ):
        alike: dict[str, list[str]] = {}
        for name, decision in decisions.items():
            alike.setdefault(str(decision.reason), []).append(name)
        shown = [f"{', '.join(fold_names(names)[:4])}: {why}" for why, names in alike.items()][:8]
        raise ValueError(
            "nothing to convert: every linear layer was left in high precision ("
            + "; ".join(shown)
            + "); name the layers to convert with layers={pattern: format}"
            + alone
        )


def why_not_convertible(module: nn.Module) -> str:
    """Why a module that multiplies has no format of the table."""
    if is_plain_linear(module) and (reason := why_it_stays(module)) is not None:
        return reason
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__}, a subclass of nn.Linear with a forward of its own"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies with its weights directly"
    if isinstance(module, CONVOLUTIONS):
        return f"{type(module).__name__}: only linear layers are converted"
    if _ROUTER.search(type(module).__name__):
        return f"router: {type(module).__name__} stays in high precision"
    return f"{a_kind(module)}, not an nn.Linear"


def why_not_experts(
    name: str, module: nn.Module, kind: ExpertsKind, conversion: Conversion
) -> str | None:
    """Why a module of experts has no row of the table; None if it has."""
    if conversion.backend == "transformer-engine":
        return "experts: Transformer Engine's backend has linear layers alone; take backend='auto'"
    named = any(rule.matches(name) for rule in conversion.rules)
    if kind.by_rule and not named:
        return (
            f"looks like experts of {kind.name}; name it in layers={{{name!r}: ...}} if its forward"
            " is theirs"
        )
    return why_experts_stay(module, kind)


def named_experts(name: str, shape: ExpertsShape, rules: Sequence[Rule]) -> dict[str, ExpertsShape]:
    """A module of experts, and those of its experts that rules name by themselves.

    Args:
        name: the module's.
        shape: how large they are.
        rules: the user's.
    """
    names = [NAME.format(module=name, expert=expert) for expert in range(shape.experts)]
    single = [rule for rule in rules if not rule.matches(name)]
    apart = [each for each in names if any(rule.matches(each) for rule in single)]
    return dict.fromkeys([name, *apart], shape)
