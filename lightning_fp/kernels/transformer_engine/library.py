"""Transformer Engine as this package uses it: found late, asked what it can do, replaceable."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lightning_fp.format_names import TE_FORMATS

EXTRA = 'pip install "lightning-fp[te]"'


@dataclass(frozen=True, kw_only=True, eq=False)
class Library:
    """The parts of Transformer Engine that are used, under the names they have there.

    Nothing else of this package touches it, so that a stand-in with the same few names can take
    its place, see `use_library`.
    """

    pytorch: Any
    """`transformer_engine.pytorch`: Linear, autocast (or fp8_autocast), is_..._available."""

    recipes: Any
    """`transformer_engine.common.recipe`: the recipe classes, Format, QParams."""

    state: Any
    """`FP8GlobalStateManager`: what the innermost autocast says."""

    version: str
    """Its version."""

    device: str = "cuda"
    """The type of device it multiplies on."""

    def autocast(
        self, *, enabled: bool, recipe: Any, group: Any = None
    ) -> AbstractContextManager[Any]:
        """Its autocast, under the name and with the arguments that this version has.

        Args:
            enabled: whether layers inside run in low precision.
            recipe: the recipe.
            group: process group over which amaxes are reduced; None for all ranks.
        """
        if hasattr(self.pytorch, "autocast"):
            return self.pytorch.autocast(enabled=enabled, recipe=recipe, amax_reduction_group=group)
        return self.pytorch.fp8_autocast(enabled=enabled, fp8_recipe=recipe, fp8_group=group)

    @contextmanager
    def region(self, recipe: Any) -> Generator[None, None, None]:
        """Low precision for one layer, whatever region is open around it.

        It takes no part in the reduction of amaxes: the outer, disabled region keeps the exit from
        updating scales, and the layer inside is not the first of a step, whose backward would
        update them.

        Args:
            recipe: one without state, i.e. not delayed scaling.
        """
        with (
            self.autocast(enabled=False, recipe=recipe),
            self.autocast(enabled=True, recipe=recipe),
        ):
            self.state.is_first_fp8_module()  # reading the flag clears it, until the region ends
            yield

    @property
    def delayed_region(self) -> bool:
        """Whether an enabled region of delayed scaling is open."""
        return self.state.is_fp8_enabled() and self.state.get_fp8_recipe().delayed()

    def refusal(self, format: str) -> str | None:
        """Why this machine cannot run a format, in its own words; None if it can.

        Args:
            format: one of `FORMATS`.
        """
        ask = getattr(self.pytorch, TE_FORMATS[format].support, None)
        if ask is None:
            return f"Transformer Engine {self.version} does not have it"
        able, reason = ask(return_reason=True)
        return None if able else f"Transformer Engine says: {reason}"


FORMATS = tuple(TE_FORMATS)
"""The formats Transformer Engine can be asked for."""

_given: list[Library] = []


def library() -> Library:
    """Transformer Engine.

    Raises:
        ValueError: if it is missing, cannot be imported, or there is no GPU for it.
    """
    if _given:
        return _given[-1]
    found = _found()
    if isinstance(found, str):
        raise ValueError(f"backend 'transformer-engine' cannot be used: {found}")
    return found


@contextmanager
def use_library(library: Library) -> Generator[None, None, None]:
    """Take this for Transformer Engine within the block, e.g. a build of one's own.

    Args:
        library: it, or anything with the same names.
    """
    _given.append(library)
    try:
        yield
    finally:
        _given.remove(library)


def refusal(format: str) -> str | None:
    """Why a format does not run with Transformer Engine here; None if it does.

    Args:
        format: one of `FORMATS`.
    """
    found = _given[-1] if _given else _found()
    return found if isinstance(found, str) else found.refusal(format)


def availability() -> dict[str, str | None]:
    """What Transformer Engine runs on this machine: the reason why not by format, None if it does.

    >>> sorted(availability())
    ['fp8-block', 'fp8-delayed', 'fp8-dynamic', 'mxfp8', 'nvfp4']
    """
    return {format: refusal(format) for format in FORMATS}


@cache
def _found() -> Library | str:
    """It, or the reason why there is none."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed; {EXTRA}"
    if not torch.cuda.is_available():  # its own functions raise without
        return "Transformer Engine needs a CUDA device, and torch finds none"
    try:
        pytorch = importlib.import_module("transformer_engine.pytorch")
        return Library(
            pytorch=pytorch,
            recipes=importlib.import_module("transformer_engine.common.recipe"),
            state=_state_manager(),
            version=str(getattr(importlib.import_module("transformer_engine"), "__version__", "?")),
        )
    except Exception as error:  # a broken installation raises anything, of several lines
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Transformer Engine is installed but cannot be imported ({line}); {EXTRA}"


def _state_manager() -> Any:
    """Where this version keeps it; `transformer_engine.pytorch.fp8` warns in newer ones."""
    name = "transformer_engine.pytorch.quantization"
    if importlib.util.find_spec(name) is None:
        name = "transformer_engine.pytorch.fp8"
    return importlib.import_module(name).FP8GlobalStateManager
