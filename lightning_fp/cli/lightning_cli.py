"""LightningCLI whose errors end in one line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch import cli

from lightning_fp.cli.config_errors import one_line


class LightningCLI(cli.LightningCLI):
    """Lightning's own; what is wrong in the YAML is said in one line that names the field."""

    def init_parser(self, **kwargs: Any) -> cli.LightningArgumentParser:
        """The parser, which does not print its usage of a hundred lines before an error."""
        parser = super().init_parser(**kwargs)
        parser.error = _end
        return parser

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer; an error in one of their options is no traceback."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "Does not validate" not in str(error):
                raise  # somebody's own, perhaps a bug
            _end(str(error), error)


def _end(message: str, ex: Exception | None = None) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2) from ex
