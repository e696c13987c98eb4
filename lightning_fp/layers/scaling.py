"""What users give as `scaling`, read in one place: plugins, `convert`, recipes, commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, get_args

from lightning_fp.choices import check_choice
from lightning_fp.format_names import AUTO
from lightning_fp.layers.backends import Backend
from lightning_fp.layers.format import (
    DynamicScaling,
    FormatLike,
    LinearFormat,
    QuantiseLike,
    linear_format,
    quantised_like,
)
from lightning_fp.numerics import DelayedScaling

ScalingLike: TypeAlias = "FormatLike | DynamicScaling | DelayedScaling"


@dataclass(frozen=True, kw_only=True)
class RunScaling:
    """How the layers of a run are scaled, where no rule says otherwise."""

    format: LinearFormat
    """Their format; where layers choose for themselves, the one they begin with."""

    delayed: DelayedScaling | None = None
    """How delayed scales follow from their history, if the user said so."""

    auto: bool = False
    """Whether layers move between dynamic and delayed scaling by what their own history shows."""

    def quantised_like(self, like: QuantiseLike | None) -> RunScaling:
        """The same with weights cast from other values; None: as the format says.

        Raises:
            ValueError: if layers choose their scaling, or nothing is cast.
        """
        if like is None:
            return self
        check_choice("quantise_like", like, get_args(QuantiseLike))
        if self.auto and like != "master":
            raise ValueError(
                f"quantise_like must be None with scaling 'auto', got {like!r}; layers move between"
                " 'fp8-dynamic' and 'fp8-delayed' there; take one of them"
            )
        return dataclasses.replace(self, format=quantised_like(self.format, like))

    def check_backend(self, backend: Backend) -> None:
        """Refuse a backend that layers cannot choose with.

        Raises:
            ValueError: naming it, and why.
        """
        if self.auto and backend in ("torchao", "transformer-engine"):
            raise ValueError(
                f"backend must be 'auto' or 'native' with scaling 'auto', got {backend!r}, which"
                " has no delayed scaling to compare with while a layer is under dynamic scaling"
            )


def layers_quantised_like(
    layers: Mapping[str, FormatLike] | None, like: QuantiseLike | None
) -> Mapping[str, FormatLike] | None:
    """Rules whose FP8 formats cast weights from other values; None: as the formats say."""
    if like is None or not isinstance(layers, Mapping):
        return layers  # what else it is, `layer_rules` refuses
    return {pattern: quantised_like(linear_format(each), like) for pattern, each in layers.items()}


def read_scaling(scaling: ScalingLike) -> RunScaling:
    """What a user's `scaling` stands for.

    >>> read_scaling("rowwise").format.name
    'fp8-rowwise'

    Args:
        scaling: "dynamic", "delayed", "rowwise", "rowwise-gw-hp", "block", "mx", the same with
            "fp8-" before it, any other format name, "auto", a `LinearFormat`, a `DynamicScaling`,
            a `DelayedScaling`, a torchao config, or a recipe of Transformer Engine.

    Raises:
        ValueError: if there is no such scaling.
    """
    if isinstance(scaling, DelayedScaling):
        return RunScaling(format=linear_format("fp8-delayed"), delayed=scaling)
    if isinstance(scaling, str) and scaling in AUTO:
        return RunScaling(format=linear_format("fp8-dynamic"), auto=True)
    try:
        return RunScaling(format=linear_format(scaling))
    except ValueError as error:
        raise ValueError(f"scaling: {error}") from error
