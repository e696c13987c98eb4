"""Recipes of Transformer Engine, made from our formats and checked before theirs are.

Their classes take unknown keyword arguments silently, a history of length 0, and scales that are
powers of two without using them. So every setting is checked against the class's fields here, and
set where the layers read it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lightning_fp.format_names import TE_FORMATS, Kind
from lightning_fp.kernels.transformer_engine.library import Library, library
from lightning_fp.numerics import DelayedScaling

CLASSES: dict[Kind, str] = {names.kind: names.recipe for names in TE_FORMATS.values()}
"""Transformer Engine's name for each kind of recipe."""

FORMAT_OF_KIND: dict[Kind, str] = {names.kind: name for name, names in TE_FORMATS.items()}
"""Our name for each kind."""

_QUANTIZED = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
"""Where current and block scaling keep what the casts of each operand read."""


@dataclass(frozen=True)
class GivenRecipe:
    """A recipe object of the user's, compared by its settings."""

    settings: tuple[tuple[str, str], ...]
    """Name and text of every field, the class first."""

    recipe: Any = dataclasses.field(compare=False, repr=False)
    """The object itself."""

    @classmethod
    def of(cls, recipe: Any) -> GivenRecipe:
        """Read a recipe.

        Args:
            recipe: any dataclass.
        """
        fields = dataclasses.fields(recipe)
        texts = [(field.name, repr(getattr(recipe, field.name))) for field in fields]
        return cls((("class", type(recipe).__name__), *texts), recipe)


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Everything that one of our formats says about a recipe."""

    kind: Kind
    """Which recipe."""

    grad_output: Literal["e4m3", "e5m2"] = "e5m2"
    """8-bit format of the gradient of the output; input and weight are e4m3."""

    power_of_two: bool = False
    """Whether scales are powers of two, where the recipe leaves the choice."""

    given: GivenRecipe | None = None
    """The user's own recipe, used as it is."""

    @property
    def format(self) -> str:
        """Our name for its kind."""
        return FORMAT_OF_KIND[self.kind]


def make_recipe(
    settings: RecipeSettings, delayed: DelayedScaling, engine: Library | None = None
) -> Any:
    """The recipe object.

    Args:
        settings: which.
        delayed: history length, algorithm and margin under delayed scaling.
        engine: whose recipes; Transformer Engine's by default.

    Returns:
        An object of `transformer_engine.common.recipe`.

    Raises:
        ValueError: if this version has no such recipe or setting.
    """
    if settings.given is not None:
        return settings.given.recipe
    engine = library() if engine is None else engine
    if settings.kind == "nvfp4":
        return _strictly(engine, settings.kind)
    format = engine.recipes.Format
    fp8_format = format.HYBRID if settings.grad_output == "e5m2" else format.E4M3
    if settings.kind == "delayed":
        return _strictly(
            engine,
            settings.kind,
            margin=delayed.margin,
            fp8_format=fp8_format,
            amax_history_len=delayed.history_len,
            amax_compute_algo=delayed.algorithm,
            reduce_amax=True,
        )
    recipe = _strictly(engine, settings.kind, fp8_format=fp8_format)
    if settings.kind in ("current", "block"):
        # The constructor's own argument is not what the quantizers read.
        for name in _QUANTIZED:
            params = dataclasses.replace(getattr(recipe, name), power_2_scale=settings.power_of_two)
            setattr(recipe, name, params)
    return recipe


def _strictly(engine: Library, kind: Kind, **settings: Any) -> Any:
    """A recipe whose class knows all of the settings."""
    cls = getattr(engine.recipes, CLASSES[kind], None)
    if cls is None:
        raise ValueError(
            f"Transformer Engine {engine.version} has no {CLASSES[kind]}, which"
            f" {FORMAT_OF_KIND[kind]!r} needs; install a newer one"
        )
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := settings.keys() - known:
        raise ValueError(
            f"{CLASSES[kind]} of Transformer Engine {engine.version} has no setting"
            f" {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    return cls(**settings)


def is_recipe(value: Any) -> bool:
    """Whether a value looks like a recipe of Transformer Engine, which need not be imported."""
    return dataclasses.is_dataclass(value) and callable(getattr(value, "delayed", None))


def delayed_of(recipe: Any) -> DelayedScaling:
    """How scales follow from their history in a delayed recipe of the user's.

    Args:
        recipe: a `DelayedScaling` of `transformer_engine.common.recipe`.

    Raises:
        ValueError: for a history of length 0 or a function as algorithm, which they take.
    """
    return DelayedScaling(
        history_len=recipe.amax_history_len,
        algorithm=recipe.amax_compute_algo,
        margin=recipe.margin,
    )


def read_recipe(recipe: Any) -> RecipeSettings:
    """Our settings for a recipe of the user's.

    Args:
        recipe: an object of `transformer_engine.common.recipe`.

    Raises:
        ValueError: for a CustomRecipe, whose quantizers may be anything, and for what is none.
    """
    if not is_recipe(recipe):
        raise ValueError(f"recipe must be one of {', '.join(CLASSES.values())}, got {recipe!r}")
    for kind, name in CLASSES.items():
        if any(base.__name__ == name for base in type(recipe).__mro__):
            if kind == "delayed":
                delayed_of(recipe)
            text: Any = getattr(recipe, "fp8_format", None)
            hybrid = getattr(text, "name", "HYBRID") == "HYBRID"
            return RecipeSettings(
                kind=kind,
                grad_output="e5m2" if hybrid else "e4m3",
                power_of_two=_power_of_two(recipe),
                given=GivenRecipe.of(recipe),
            )
    raise ValueError(
        f"recipe must be one of {', '.join(CLASSES.values())}, got {type(recipe).__name__}, of"
        " which it is not known how it casts"
    )


def _power_of_two(recipe: Any) -> bool:
    return any(
        getattr(getattr(recipe, name, None), "power_2_scale", False) is True for name in _QUANTIZED
    )
