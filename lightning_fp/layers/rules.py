"""Which layer gets which format: the user's ordered rules, then the defaults."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_fp.choices import near_names
from lightning_fp.counting import counted
from lightning_fp.format_names import ALIGNMENT
from lightning_fp.layers.format import FormatLike, LinearFormat, linear_format
from lightning_fp.shown import shown

_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
)
_CALL_IT_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Wrappers whose inside is `module`, a name that a user's own module may have as well."""
_HEAD_ANYWHERE = {"lm_head", "output_layer", "embed_out", "classifier", "score", "logits"}
_HEAD_AT_END = {"head", "output", "decoder", "unembed", "unembedding", "to_logits"}
_ROUTER_AT_END = {"gate", "router", "gating", "gate_network", "router_linear", "shared_expert_gate"}
_SINGLE_EXPERT = re.compile(r"(.+)\[([\d*?]+)\]")
_END = fnmatch.translate("").removeprefix("(?s:)")
"""What ends an expression made of a glob."""
_ADAPTER = re.compile(r"lora_|adapter|vera_|dora_|ia3_")


def clean_name(fqn: str) -> str:
    """A module's name without the wrappers of torch.compile, checkpointing, FSDP and Fabric.

    >>> clean_name("model.blocks.0._orig_mod.fc")
    'model.blocks.0.fc'
    """
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)


def clean_named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` with the names that a user knows, whatever wraps the model or parts.

    A wrapper and what it wraps have the same name, in this order.
    """
    for _, name, module in modules_by_both_names(model):
        yield name, module


def modules_by_both_names(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, str, nn.Module]]:
    """Each module with its name in `model.named_modules()` and the name that a user knows.

    Args:
        model: any, with its wrappers.
        remove_duplicate: whether a module that is in several places has its first name only.
    """
    seen: dict[str, tuple[str, nn.Module]] = {}
    for fqn, module in model.named_modules(remove_duplicate=remove_duplicate):
        parent, _, part = fqn.rpartition(".")
        name = ""
        if fqn:
            name, owner = seen[parent]
            dropped = part in _WRAPPERS or (part == "module" and isinstance(owner, _CALL_IT_MODULE))
            name = name if dropped else f"{name}.{part}".removeprefix(".")
        seen[fqn] = name, module
        yield fqn, name, module


class Sized(Protocol):
    """What multiplies, by its features: a linear layer, or experts."""

    @property
    def in_features(self) -> int:
        """Of the input."""
        ...

    @property
    def out_features(self) -> int:
        """Of the output; of experts those inside."""
        ...


@dataclass(frozen=True)
class Rule:
    """One entry of `layers=`: a pattern and the format of the layers it matches."""

    pattern: str
    """A glob over the whole name, or a regular expression over the whole name after "re:"."""

    format: LinearFormat

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return compile_pattern(self.pattern)

    def matches(self, name: str) -> bool:
        """Whether the pattern covers the whole of `name`."""
        return self._compiled.fullmatch(name) is not None


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a layer pattern.

    Raises:
        ValueError: if it is not a string or not a valid expression.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"layer pattern must be a string, got {pattern!r}")
    if not pattern.startswith("re:"):
        expression = fnmatch.translate(pattern)
        if found := _SINGLE_EXPERT.fullmatch(pattern):  # its brackets are a glob's too: either
            module, expert = (fnmatch.translate(part) for part in found.groups())
            single = rf"{module.removesuffix(_END)}\[{expert.removesuffix(_END)}\]"
            expression = f"(?:{expression})|(?:{single})"
        return re.compile(expression)
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(
            f"layer pattern must be a regular expression, got {pattern!r}: {error}"
        ) from error


def layer_rules(layers: Mapping[str, FormatLike] | None) -> tuple[Rule, ...]:
    """Read the `layers=` argument.

    Args:
        layers: `{pattern: format}`; the first match wins, so order matters.

    Returns:
        The rules in order.

    Raises:
        ValueError: for anything that is not such a mapping, naming the entry.
    """
    if layers is None:
        return ()
    if not isinstance(layers, Mapping):
        raise ValueError(
            f"layers must be a mapping {{pattern: format}}, got {type(layers).__name__};"
            " e.g. {'*.mlp.*': 'fp8-rowwise', '*head': 'bf16'}"
        )
    rules: list[Rule] = []
    for pattern, format in layers.items():
        try:
            compile_pattern(pattern)
            rules.append(Rule(pattern, linear_format(format)))
        except ValueError as error:
            raise ValueError(f"layers[{shown(pattern)}]: {error}") from error
    return tuple(rules)


def check_rules_apply(
    rules: Iterable[Rule], names: Iterable[str], left_alone: Mapping[str, str]
) -> None:
    """Refuse rules without effect: a typo in a pattern must not go unseen.

    Args:
        rules: in order.
        names: the layers whose format can change.
        left_alone: all other modules, with the reason why their format cannot.

    Raises:
        ValueError: naming the rule, with near misses.
    """
    remaining, names = set(names), list(names)
    for rule in rules:
        matched = [name for name in names if rule.matches(name)]
        if not matched:
            raise ValueError(f"layers: {no_match_message(rule.pattern, names, left_alone)}")
        if remaining.isdisjoint(matched):
            raise ValueError(
                f"layers: rule {rule.pattern!r} never applies, earlier rules take the"
                f" {counted(len(matched), 'layer')} it matches; put it before them"
            )
        remaining.difference_update(matched)


def no_match_message(
    pattern: str, names: Iterable[str], left_alone: Mapping[str, str] | None = None
) -> str:
    """Why a pattern matched no layer, and what the user may have meant."""
    compiled, names = compile_pattern(pattern), list(names)
    others = [name for name in left_alone or {} if compiled.fullmatch(name)]
    if others and left_alone:
        shown = ", ".join(f"{name} ({left_alone[name]})" for name in others[:3])
        inside = [name for name in names if name.startswith(f"{others[0]}.")]
        hint = f"; for the layers inside write {others[0] + '.*'!r}" if inside else ""
        return f"pattern {pattern!r} matches only modules that cannot be converted: {shown}{hint}"
    near = near_names(pattern.removeprefix("re:").strip("*."), names, 3, cutoff=0.3)
    hint = ", ".join(near or names[:3]) or "none: the model has no linear layer"
    return (
        f"pattern {pattern!r} matches no linear layer; it must cover the whole name."
        f" Near misses: {hint}"
    )


def default_exclusion(
    name: str, linear: Sized, *, tied: bool, too_small: bool, multiple: int = ALIGNMENT
) -> str | None:
    """Why a layer that no rule names stays in high precision.

    Args:
        name: the layer's name.
        linear: the layer.
        tied: whether it shares its weight with an embedding.
        too_small: whether FP8 hardware is predicted not to gain on it, see
            `lightning_fp.kernels.cost`.
        multiple: what its dimensions must be multiples of.

    Returns:
        The reason, or None if the layer is to be converted.
    """
    parts = [part for part in name.split(".") if part != "base_layer"] or [""]
    if tied:
        return "output head: shares its weight with the embedding"
    if parts[-1] in _HEAD_AT_END or _HEAD_ANYWHERE.intersection(parts):
        return "output head"
    if parts[-1] in _ROUTER_AT_END:
        return "router or gate"
    if any(_ADAPTER.search(part) for part in parts):
        return "adapter"
    for dimension in ("in_features", "out_features"):
        size = getattr(linear, dimension)
        if size % multiple:
            return f"{dimension}={size} is not a multiple of {multiple}"
    if too_small:
        return f"too small to gain ({linear.in_features} -> {linear.out_features})"
    return None


def narrow_adapter(name: str, linear: Sized) -> str | None:
    """Why an adapter stays in high precision even where a rule names it; None if it need not.

    FP8 hardware cannot multiply LoRA's usual ranks of 4 and 8. So nobody does, and what is tried on
    a CPU holds there.
    """
    if not any(_ADAPTER.search(part) for part in name.split(".")):
        return None
    rank = min(linear.in_features, linear.out_features)
    return f"adapter of rank {rank}, not a multiple of {ALIGNMENT}" if rank % ALIGNMENT else None
