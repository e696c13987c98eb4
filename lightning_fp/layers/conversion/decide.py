"""Which format each layer gets, decided before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
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
from lightning_fp.layers.format import NAMED_FORMATS, LinearFormat
from lightning_fp.layers.linear import (
    CAST_DTYPES,
    first_parameter,
    has_formats,
    is_plain_linear,
    why_it_stays,
)
from lightning_fp.layers.rules import (
    Rule,
    check_rules_apply,
    clean_named_modules,
    default_exclusion,
    narrow_adapter,
)
from lightning_fp.layers.stored import Frozen
from lightning_fp.layers.transformer_engine.setup import check_model


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
    fixed: dict[str, str] = {}
    multiplying: dict[str, str] = {}
    other_dtypes: list[str] = []
    for name, module in clean_named_modules(model):
        if has_formats(module):
            linears[name] = module
            continue
        fixed[name] = why_not_convertible(module)
        if multiplies(module):
            multiplying[name] = fixed[name]
        if is_plain_linear(module) and module.weight.dtype not in CAST_DTYPES:
            other_dtypes.append(name)  # a rule may name them: it then has no effect
    check_rules_apply(conversion.rules, [*linears, *other_dtypes], fixed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decisions = {
        name: _decide_one(name, linear, conversion, tied=id(first_parameter(linear)) in embeddings)
        for name, linear in linears.items()
    }
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
    name: str, linear: nn.Linear, conversion: Conversion, *, tied: bool
) -> LayerDecision:
    for rule in conversion.rules:
        if rule.matches(name):
            chosen = conversion.resolve(rule.format)
            narrow = narrow_adapter(name, linear) if rule.format.is_fp8 else None
            if narrow is not None:
                high = conversion.resolve(conversion.high_precision)
                return LayerDecision(resolved=high, reason=narrow, by_default=True)
            _check_runs(name, linear, chosen)
            high = rule.format.is_high_precision
            reason = f"rule {rule.pattern!r}: {rule.format.name!r}" if high else None
            return LayerDecision(resolved=chosen, reason=reason)
    chosen = conversion.resolve(conversion.format)
    if chosen.format.is_high_precision:
        return LayerDecision(resolved=chosen, reason="the format of the run")
    too_small = chosen.kernel.runs_on_fp8_hardware and _too_small(linear, chosen.format, conversion)
    # Emulated blocks may be ragged: only hardware leaves such layers alone by default.
    multiple = max(chosen.alignment, ALIGNMENT)
    if is_lazy(first_parameter(linear)) and chosen.kernel.runs_on_fp8_hardware:
        reason = _LAZY
    else:
        reason = default_exclusion(name, linear, tied=tied, too_small=too_small, multiple=multiple)
    if reason is not None:
        high = conversion.resolve(conversion.high_precision)
        return LayerDecision(resolved=high, reason=reason, by_default=True)
    return LayerDecision(resolved=chosen, reason=None)


def _too_small(linear: nn.Linear, format: LinearFormat, conversion: Conversion) -> bool:
    """Whether FP8 is predicted to gain nothing on a layer whose size is known."""
    casting = casting_of(format, str(conversion.backend))
    shape = linear.in_features, linear.out_features
    if casting is None or 0 in shape:
        return False
    return not gains(casting, *shape, card=conversion.card, tokens=conversion.tokens)


def _check_runs(name: str, linear: nn.Linear, chosen: Resolved) -> None:
    """An explicit rule overrules the defaults, but not the hardware."""
    if is_lazy(first_parameter(linear)) and chosen.kernel.runs_on_fp8_hardware:
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
        shown = [f"{name}: {decision.reason}" for name, decision in decisions.items()][:8]
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
    return f"a {type(module).__name__}, not an nn.Linear"
