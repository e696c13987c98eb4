"""Which layers a verdict takes in, and what they get.

As little as may cure, since each layer in high precision costs speed. What comes back although its
culprits were demoted lay beside them, or was not theirs alone: so the next verdict takes in their
blocks, and the one after it everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.respond.fallback_policy import Scope


def demotion(
    culprits: Mapping[str, LinearFormat],
    *,
    low: Collection[str],
    high: LinearFormat,
    demoted: Collection[str],
    scope: Scope,
    final: bool,
    whole: bool,
) -> tuple[dict[str, LinearFormat], str]:
    """The formats that layers get, and why.

    Args:
        culprits: by layer, the least safe format in which it does no harm; empty where no few
            layers explain the error.
        low: all layers in low precision, in the order of the model.
        high: the high precision of this run.
        demoted: the layers that are demoted already.
        scope: what this demotion takes in.
        final: whether it is the last.
        whole: whether all layers can only fall back together.
    """
    everything = dict.fromkeys(low, high)
    if final:
        return everything, "precision did harm again: all layers stay in high precision from now on"
    if whole:
        return everything, "all layers together, since they cannot change one by one"
    if not culprits:
        return everything, "a few layers do not explain it: all layers change"
    if scope == "layers":
        return dict(culprits), "the layers at fault, each to the first format that does no harm"
    if scope == "group":
        groups = {group_of(name) for name in (*culprits, *demoted)}
        group = {name: high for name in low if group_of(name) in groups}
        return group, "it came back: all layers in the blocks of those at fault"
    return everything, "it came back again: all layers change"


def group_of(name: str) -> str:
    """The block a layer belongs to: its name up to the first number, e.g. "model.blocks.3"."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])
