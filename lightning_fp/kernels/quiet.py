"""Modules of torchao, imported without a word."""

from __future__ import annotations

import importlib
import logging
from typing import Any


def import_quietly(module: str) -> Any:
    """A module of torchao, without its notes about CUDA libraries it did not find."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        return importlib.import_module(module)
    finally:
        logging.disable(before)
