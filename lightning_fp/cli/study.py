"""Answer a question about a run: `study clamp`: do loss spikes come from clamping?"""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from lightning_fp.cli import study_clamp

_STUDIES = {"clamp": study_clamp}


def add_arguments(parser: ArgumentParser) -> None:
    """One subcommand for each study."""
    studies = parser.add_subcommands(dest="study", required=True)
    for name, module in _STUDIES.items():
        summary, *_ = (module.__doc__ or "").partition("\n")
        command = ArgumentParser(description=module.__doc__)
        module.add_arguments(command)
        studies.add_subcommand(name, command, help=summary)


def run(study: str, **options: Any) -> int:
    """Run one study.

    Raises:
        ValueError: for what the user can put right.
    """
    return _STUDIES[study].run(**vars(options[study]))
