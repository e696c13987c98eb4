"""Transformer Engine's products: its library, its recipes, the kernel over both."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.kernels.transformer_engine.kernel import availability
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["availability"]
