"""Elsewhere: a model that a plugin has converted, after the Trainer of that plugin."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch.nn import Module


class Elsewhere:
    """Whether a model has come into a Trainer of another precision, which is to have its own.

    Without this it would go on in FP8 there, unwatched and unsaid. In a loop of one's own, and in a
    Trainer with the same plugin, the layers keep their formats.

    Args:
        plugin: whose Trainer is over.
        model: what it has converted.
    """

    def __init__(self, plugin: Precision, model: Module | None) -> None:
        self._plugin: Callable[[], Precision | None] = weakref.ref(plugin)
        self._model = None if model is None else weakref.ref(model)

    def __getstate__(self) -> None:
        """A pickled model knows neither: what loads it is a loop of one's own."""

    def __setstate__(self, state: None) -> None:
        self._plugin, self._model = _nobody, None

    def __call__(self) -> bool:
        """Asked by each training forward; torch.compile keeps the answer it found."""
        return _elsewhere(self)

    def ask(self) -> bool:
        """See `__call__`."""
        model = None if self._model is None else self._model()
        trainer: Any = getattr(model, "_trainer", None)
        return trainer is not None and trainer.precision_plugin is not self._plugin()


def _nobody() -> None:
    """In place of a reference that is gone."""


@torch.compiler.assume_constant_result
def _elsewhere(asked: Elsewhere) -> bool:
    return asked.ask()
