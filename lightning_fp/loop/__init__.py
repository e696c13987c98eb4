"""PrecisionLoop: what the Trainer's plugin and callbacks do, in a training loop of your own."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.loop.precision_loop import PrecisionLoop
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "PrecisionLoop",
]
