"""Telemetry may not end a run: its first failure is told, and it measures no more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Failsafe:
    """What measures, and stops with its first failure.

    Args:
        name: who it is, for the message of a failure.
        measured: what ends with it, in the plural.
    """

    def __init__(self, name: str, measured: str) -> None:
        self._name, self._measured = name, measured
        self.failed = False
        """Whether this rank measures no more."""

    def _safely(self, function: Callable[..., object], *args: Any) -> None:
        """Call it, unless something has failed before."""
        if not self.failed:
            self._even_so(function, *args)

    def _even_so(self, function: Callable[..., object], *args: Any) -> None:
        """Call it also after a failure: what was measured before it is good."""
        try:
            function(*args)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        """In an except clause: say so, once."""
        if not self.failed:
            message = "%s failed; training continues, its %s end here"
            log.exception(message, self._name, self._measured)
        self.failed = True
