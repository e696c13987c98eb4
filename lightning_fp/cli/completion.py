"""Completion of the command line, by shtab."""

from __future__ import annotations

import importlib
from typing import Any


def run(shell: str) -> int:
    """Print a shell's completion script.

    Args:
        shell: one that shtab knows.

    Raises:
        ValueError: if shtab is not installed.
    """
    from lightning_fp import __version__
    from lightning_fp.cli.parser import build_parser
    from lightning_fp.cli.signatures import COMMANDS

    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError as error:
        raise ValueError(
            'completion needs shtab, which is not installed: pip install "lightning-fp[completion]"'
        ) from error
    parser = build_parser(COMMANDS, description="", version=__version__)
    print(shtab.complete(parser, shell))
    return 0
