"""A line on the terminal while a plain loop runs: step, loss, what is in FP8."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from torch import Tensor

EVERY = 0.5
"""Seconds from one drawing to the next: to read a loss waits for the device."""


class ProgressLine:
    """Draws on a terminal, and nowhere else.

    Args:
        on: whether to; None: if standard error is a terminal.
        steps: of the whole run, if that is known.
    """

    def __init__(self, on: bool | None, steps: int | None) -> None:
        self._on = sys.stderr.isatty() if on is None else on
        self._steps = steps
        self._drawn_at = 0.0
        self._bar: object | None = None

    def show(self, step: int, loss: Tensor, words: Callable[[], Mapping[str, str]]) -> None:
        """A step is over.

        Args:
            step: optimizer steps done.
            loss: of it, on its device.
            words: what else to show.
        """
        now = time.monotonic()
        if not self._on or now - self._drawn_at < EVERY:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._drawn_at = now
        if not isinstance(self._bar, Progress):
            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task("", total=self._steps)
            self._bar.start()
        said = "  ".join(f"{name} {word}" for name, word in words().items() if word)
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=step, description=f"loss {float(loss):.4f}  {said}")

    def close(self) -> None:
        """Leave the terminal."""
        bar, self._bar = self._bar, None
        stop = getattr(bar, "stop", None)
        if stop is not None:
            stop()
