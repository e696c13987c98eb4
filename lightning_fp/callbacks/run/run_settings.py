"""The options of a run's plugin and callbacks, as hyperparameters for its loggers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import lightning as L

log = logging.getLogger(__name__)

PREFIX = "lightning_fp"
"""Before the names of hyperparameters, so that they meet none of the module's own."""


class Settled(Protocol):
    """A callback that tells its options."""

    def settings(self) -> dict[str, Any]:
        """The options, as plain data."""
        ...


def settings_by_class(plugin: Any, callbacks: Iterable[Settled]) -> dict[str, dict[str, Any]]:
    """The options of a precision plugin and of callbacks.

    Args:
        plugin: any precision plugin; of one that is none of ours, its precision is told.
        callbacks: ours; the second one of a class is called "ParityProbe 2".
    """
    own: Any = getattr(plugin, "settings", None)
    precision = {"precision": str(getattr(plugin, "precision", ""))}
    settings: dict[str, dict[str, Any]] = {type(plugin).__name__: own() if own else precision}
    for callback in callbacks:
        name, number = type(callback).__name__, 2
        while name in settings:
            name, number = f"{type(callback).__name__} {number}", number + 1
        settings[name] = callback.settings()
    return settings


def log_settings(trainer: L.Trainer, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell all loggers the settings, beside the hyperparameters of the module.

    To be called before Lightning tells the module's: TensorBoard shows those that it hears first,
    so that they are told here as well.

    Args:
        trainer: the Trainer, in `fit`.
        settings: see `settings_by_class`.
    """
    if not (trainer.is_global_zero and trainer.loggers):
        return
    try:
        told = {**_of_the_module(trainer), **flat(settings, PREFIX)}
        for logger in trainer.loggers:
            logger.log_hyperparams(told)
    except Exception:
        log.exception("the loggers cannot be told the settings; training continues")


def _of_the_module(trainer: L.Trainer) -> dict[str, Any]:
    """What Lightning will tell of the module's and the data's hyperparameters."""
    found: dict[str, Any] = {}
    datamodule: Any = getattr(trainer, "datamodule", None)
    for source in (trainer.lightning_module, datamodule):
        if source is not None and source._log_hyperparams:
            found.update(source.hparams_initial)
    found.pop("_class_path", None)
    return found


def flat(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested options by their path.

    >>> flat({"scaling": "delayed", "layers": {"*head": "bf16"}}, "FP8Precision")
    {'FP8Precision/scaling': 'delayed', 'FP8Precision/layers/*head': 'bf16'}

    Args:
        settings: numbers, strings, sequences of them, and mappings.
        prefix: before each name.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            found.update(flat(value, path))
        elif isinstance(value, (list, tuple)):
            found[path] = ", ".join(map(str, value))  # pyright: ignore
        else:
            found[path] = value if isinstance(value, (bool, int, float)) else str(value)
    return found
