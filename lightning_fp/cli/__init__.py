"""The command line: `lightning-fp doctor | plan | demo | ...`, one module for each command."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from lightning_fp import __version__
from lightning_fp.cli.parser import PROGRAM, build_parser
from lightning_fp.cli.signatures import COMMANDS

__all__ = ["main"]

_REFUSED = 2
_INTERRUPTED = 130
"""What a shell reports of a program that Ctrl-C has ended: 128 and the signal's number."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the command line without the program's name; the process's own by default.

    Returns:
        The exit code: 1 if the command found that something is wrong, 2 for what the user can put
        right, said in one line on stderr, 130 after Ctrl-C.

    Raises:
        SystemExit: after help, or for a command line that is none, with code 0 or 2.
    """
    started = time.time()
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII alone shows "?"
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if args is None else list(args)
    parser = build_parser(
        COMMANDS, description="Low-precision training for PyTorch Lightning.", version=__version__
    )
    options = vars(parser.parse_args(given))
    command = options.pop("command")
    try:
        return _run(command, options)
    except ValueError as error:
        print(f"{PROGRAM} {given[0]}: {error}", file=sys.stderr)
        return _REFUSED
    except OSError as error:  # a full disk, a directory that nobody may write to
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"{PROGRAM} {given[0]}: {where}{error.strerror or error}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt:
        from lightning_fp.cli.interrupted import kept

        print(f"\n{PROGRAM} {given[0]}: stopped; {kept(options, started)}", file=sys.stderr)
        return _INTERRUPTED


def _run(command: Any, options: dict[str, Any]) -> int:
    """Run it; Lightning's Trainer ends the process by itself after Ctrl-C, which is undone."""
    try:
        return command(**options)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from end
        raise
