"""`Trainer(precision="fp8-dynamic")`: this package's names where Lightning takes its own.

Lightning accepts a closed list of strings there (Lightning-AI/pytorch-lightning#21425). One place
is patched: the constructor that reads the Trainer's flags. Our names are moved from `precision`
to `plugins`, all others pass unchanged.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, get_args

import lightning
from lightning.fabric.plugins.precision.precision import (
    _PRECISION_INPUT_STR,
    _PRECISION_INPUT_STR_ALIAS,
)
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_fp.choices import near_names
from lightning_fp.format_names import AUTO, CANONICAL
from lightning_fp.plugins.names import precision_plugin

_NAMES = tuple(name for name in (*CANONICAL, *AUTO) if name not in ("high", "bf16"))
"""Lightning has a "bf16" of its own."""
_OURS = re.compile(rf"({'|'.join(map(re.escape, _NAMES))})(\[.*\])?|fp8.*|e\d+m\d+.*")
_LIGHTNINGS = {*get_args(_PRECISION_INPUT_STR), *get_args(_PRECISION_INPUT_STR_ALIAS)}
_ALIKE = 0.8
"""How much a name must look like one of ours for the error to be in our words."""
_EXPECTED = {"self", "precision", "plugins"}
_original: Any = None


def enable_precision_names() -> None:
    """Let `Trainer(precision=...)` take this package's names, e.g. "fp8-dynamic" or "rowwise".

    Does nothing the second time; `lightning_fp.register.undo()` takes it back.

    >>> enable_precision_names()
    >>> trainer = lightning.Trainer(accelerator="cpu", precision="fp8-dynamic", logger=False)
    >>> type(trainer.precision_plugin).__name__
    'FP8Precision'
    >>> undo()

    Raises:
        RuntimeError: if this Lightning version does not have the place to patch.
    """
    global _original
    if _original is not None:
        return
    parameters = inspect.signature(_AcceleratorConnector.__init__).parameters
    if not _EXPECTED.issubset(parameters):
        raise RuntimeError(
            f"enable_precision_names does not know lightning {lightning.__version__}: its"
            " accelerator connector takes other arguments; pass"
            " Trainer(plugins=lightning_fp.precision_plugin(name)) instead"
        )
    _original = _AcceleratorConnector.__init__

    @functools.wraps(_original)
    def init(self: _AcceleratorConnector, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(_original).bind(self, *args, **kwargs)
        precision = bound.arguments.get("precision")
        if isinstance(precision, str) and _is_ours(precision):
            plugins = bound.arguments.get("plugins")
            if plugins is None:
                plugins = []
            elif not isinstance(plugins, (list, tuple)):
                plugins = [plugins]
            bound.arguments["plugins"] = [*plugins, precision_plugin(precision)]
            bound.arguments["precision"] = None
        _original(*bound.args, **bound.kwargs)

    _AcceleratorConnector.__init__ = init


def undo() -> None:
    """Restore Lightning's own constructor; does nothing if it is in place."""
    global _original
    if _original is not None:
        _AcceleratorConnector.__init__ = _original
        _original = None


def _is_ours(name: str) -> bool:
    """Whether a name is one of ours, or looks more like one than anything Lightning has."""
    if name in _LIGHTNINGS:
        return False
    return bool(_OURS.fullmatch(name) or near_names(name, _NAMES, 1, cutoff=_ALIKE))
