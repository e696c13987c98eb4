"""CompileClock: how long torch compiles, so that who waits for a step hears why."""

from __future__ import annotations

from contextlib import suppress
from time import perf_counter
from typing import Any


class CompileClock:
    """Adds up the seconds in which torch compiles, from `start` to `close`.

    Of what torch's caches hold, it is the time to look it up.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._began, self._seconds = 0.0, 0.0

    @property
    def runs(self) -> bool:
        """Whether it has been started."""
        return self._handler is not None

    def start(self) -> None:
        """Look on from here; not before code is compiled, since dynamo takes long to import."""
        from torch._dynamo.callback import callback_handler

        self._handler = callback_handler
        self._handler.register_start_callback(self._begin)
        self._handler.register_end_callback(self._end)

    def take(self) -> float:
        """The seconds since the last time."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Look on no more."""
        handler, self._handler = self._handler, None
        if handler is not None:
            with suppress(ValueError):  # `torch._dynamo.reset` has forgotten them
                handler.remove_start_callback(self._begin)
            with suppress(ValueError):
                handler.remove_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._began = perf_counter()

    def _end(self, _: object) -> None:
        self._seconds += perf_counter() - self._began
