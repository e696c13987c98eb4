"""The options of another library, read strictly, and what Transformer Engine's recipes are here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_fp.format_names import TE_FORMATS
from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.numerics import DelayedScaling

RECIPES = {
    **{names.megatron: name for name, names in TE_FORMATS.items()},
    "blockwise": "fp8-block[power_of_two=true]",
}
"""Megatron's names of Transformer Engine's recipes; its block scales are powers of two unless an
environment variable says otherwise."""


class Options:
    """A library's options; each is taken once, and what is left over is unknown."""

    def __init__(self, library: str, options: object) -> None:
        self._library = library
        self._left = dict(options if isinstance(options, Mapping) else vars(options))
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """An option's value."""
        return self._left.pop(name, default)

    def refuse(self, name: str, value: object, why: str) -> ValueError:
        """The error for an option without an equal."""
        return ValueError(f"{self._library} option {name} has no equal here, got {value!r}; {why}")

    def must_be(self, name: str, only: object, why: str) -> None:
        """Take an option of which one value has an equal."""
        value = self.take(name, only)
        if value != only and value is not None:
            raise self.refuse(name, value, why)

    def note(self, name: str, usual: object, text: str) -> None:
        """Take an option that changes no arithmetic; say so if it is set."""
        if self.take(name, usual) not in (usual, None):
            self.notes.append(f"{name}: {text}")

    def end(self) -> tuple[str, ...]:
        """The notes; refuses options nobody knows."""
        if self._left:
            raise ValueError(
                f"{self._library} options must be those of its documentation, got"
                f" {', '.join(sorted(self._left))}; leave out what is not about precision"
            )
        return tuple(self.notes)


def recipe_format(kind: str, fp8_format: str, options: Options) -> LinearFormat:
    """The format of a recipe of Transformer Engine in one of its number formats."""
    if kind not in RECIPES:
        raise options.refuse("fp8_recipe", kind, f"take one of {', '.join(RECIPES)}")
    format = linear_format(RECIPES[kind])
    gradients = {"hybrid": "e5m2", "e4m3": "e4m3"}
    if fp8_format.lower() not in gradients:
        raise options.refuse("fp8_format", fp8_format, f"take one of {', '.join(gradients)}")
    return dataclasses.replace(format, grad_output=gradients[fp8_format.lower()])


def delayed_scaling(options: Options, prefix: str, usual: DelayedScaling) -> DelayedScaling:
    """The history that the options ask for.

    Args:
        options: where they are.
        prefix: what stands before their names.
        usual: the library's own defaults.
    """
    algorithm = options.take(f"{prefix}amax_compute_algo") or usual.algorithm
    if algorithm not in ("max", "most_recent"):
        raise options.refuse("amax_compute_algo", algorithm, "take 'max' or 'most_recent'")
    return DelayedScaling(
        history_len=options.take(f"{prefix}amax_history_len") or usual.history_len,
        algorithm=algorithm,
        margin=options.take(f"{prefix}margin") or usual.margin,
    )


def scaling_of(format: LinearFormat, history: DelayedScaling) -> str | DelayedScaling:
    """What `FP8Precision(scaling=...)` takes for a format, with a history if it is delayed."""
    if format.scaling != "delayed":
        return format.name
    if format == linear_format("fp8-delayed"):
        return history
    if history == DelayedScaling():
        return format.name
    raise ValueError(
        f"{format.name!r} together with {history} has no equal here: a history other than"
        " DelayedScaling()'s needs e5m2 gradients and FP8 for all products; take 'hybrid', or"
        " DelayedScaling()'s values"
    )
