"""The command line: `lightning-fp doctor | plan | demo | ...`, one module for each command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lightning_fp.cli import baseline, demo, doctor, mismatch, plan, recipes, report, stats, study

__all__ = ["main"]

_COMMANDS = {
    "doctor": doctor,
    "plan": plan,
    "recipes": recipes,
    "mismatch": mismatch,
    "demo": demo,
    "baseline": baseline,
    "stats": stats,
    "report": report,
    "study": study,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the command line without the program's name; the process's own by default.

    Returns:
        The exit code: 2 for what the user can put right, said in one line on stderr.
    """
    parser = ArgumentParser(
        prog="lightning-fp", description="Low-precision training for PyTorch Lightning."
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary, *_ = (module.__doc__ or "").partition("\n")
        command = ArgumentParser(description=module.__doc__)
        commands.add_subcommand(name, command, help=summary)  # first: it may have its own
        module.add_arguments(command)

    parsed = parser.parse_args(None if args is None else list(args))
    options = vars(parsed[parsed.command])
    try:
        return _COMMANDS[parsed.command].run(**options)
    except ValueError as error:
        print(f"lightning-fp {parsed.command}: {error}", file=sys.stderr)
        return 2
