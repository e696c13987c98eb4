"""A word about the watch in the progress bar.

A line in the log that the watch has failed, or replays less than it could, is gone from the screen
within seconds. The bar is what people look at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Trainer

from lightning_fp.callbacks.run.replaced import replaced

NAME = "watch"
"""What it is called there."""


def shown_in_bar(trainer: Trainer, word: Callable[[], str]) -> AbstractContextManager[object]:
    """Within it the bar has the word beside its numbers.

    Args:
        trainer: the Trainer; without a bar nothing happens.
        word: what to show at this moment; nothing if empty.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        return nullcontext()
    metrics_of = bar.get_metrics

    def with_word(*args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics, said = metrics_of(*args, **kwargs), word()
        return {**metrics, NAME: said} if said else metrics

    return replaced(bar, get_metrics=with_word)
