"""`lightning-fp demo`: what the package does, shown on a small GPT on this machine."""

from lightning_fp.demo.data import ByteBatches, read_sources
from lightning_fp.demo.model import ByteGPT
from lightning_fp.demo.run import DemoOptions, run_demo

__all__ = [
    # what is trained, and on what
    "ByteBatches",
    "ByteGPT",
    "read_sources",
    # the demo
    "DemoOptions",
    "run_demo",
]
