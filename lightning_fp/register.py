"""Importing this module lets `Trainer(precision="fp8-dynamic")` take this package's format names.

Lightning accepts a closed list of strings there (Lightning-AI/pytorch-lightning#21425). One place
is patched: the constructor that reads the Trainer's flags. Our names are moved from `precision`
to `plugins`, all others pass unchanged. `lightning_fp.register.undo()` takes it back.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import lightning
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_fp.format_names import AUTO, CANONICAL
from lightning_fp.plugins import precision_plugin

_NAMES = "|".join(re.escape(name) for name in (*CANONICAL, *AUTO) if name not in ("high", "bf16"))
_OURS = re.compile(rf"({_NAMES})(\[.*\])?|fp8-.*|e\d+m\d+.*")
"""Lightning has a "bf16" of its own."""
_EXPECTED = {"self", "precision", "plugins"}
_original: Any = None


def register() -> None:
    """Let `Trainer(precision=...)` take the names; does nothing the second time.

    Raises:
        RuntimeError: if this Lightning version does not have the place to patch.
    """
    global _original
    if _original is not None:
        return
    parameters = inspect.signature(_AcceleratorConnector.__init__).parameters
    if not _EXPECTED.issubset(parameters):
        raise RuntimeError(
            f"lightning_fp.register does not know lightning {lightning.__version__}: its"
            " accelerator connector takes other arguments; pass"
            " Trainer(plugins=lightning_fp.precision_plugin(name)) instead"
        )
    _original = _AcceleratorConnector.__init__

    @functools.wraps(_original)
    def init(self: _AcceleratorConnector, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(_original).bind(self, *args, **kwargs)
        precision = bound.arguments.get("precision")
        if isinstance(precision, str) and _OURS.fullmatch(precision):
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


register()
