"""Importing this module calls `lightning_fp.enable_precision_names()`; `undo()` takes it back.

The call says by itself what it does, and no linter removes it as an unused import.
"""

from __future__ import annotations

from lightning_fp.plugins.precision_names import enable_precision_names as register
from lightning_fp.plugins.precision_names import undo

__all__ = ["register", "undo"]

register()
