"""Other formats for a while, as a replay needs them, and no trace of it afterwards."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager

from lightning_fp.layers.backends import Resolved
from lightning_fp.layers.switchable import SwitchableLayer


@contextmanager
def lent_formats(
    layers: Mapping[str, SwitchableLayer], formats: Mapping[str, Resolved], *, recording: bool
) -> Generator[None, None, None]:
    """Layers in other formats, which collect nothing.

    Args:
        layers: all of a table.
        formats: those of some of them, by name; the others keep theirs.
        recording: whether layers go on recording, and what they record is dropped; else they record
            nothing.
    """
    kept = [(layer, layer.format, layer.kernel) for layer in layers.values()]
    flags = [(layer, layer.record, layer.collect) for layer in layers.values()]
    try:
        for name, other in formats.items():
            layer = layers[name]
            if other.format != layer.format:  # equal ones keep their kernel, which may be warm
                layer.switch(other.format, other.kernel)
        with _recording(layers.values(), recording):
            yield
    finally:
        for layer, format, kernel in kept:
            layer.switch(format, kernel)
        for layer, record, collect in flags:
            layer.record, layer.collect = record, collect


@contextmanager
def _recording(layers: Iterable[SwitchableLayer], on: bool) -> Generator[None, None, None]:
    with ExitStack() as dropped:
        for layer in layers:
            layer.record, layer.collect = layer.record and on, False
            if layer.record and layer.memory is not None:
                dropped.enter_context(layer.memory.put_back())
        yield
