"""The card that is measured, and one that only stands in for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from parts.rows import NotHereError


class Card:
    """A device, how time and memory are measured on it, and how large things are to be."""

    device = torch.device("cuda")
    dtype = torch.bfloat16
    compiler = "inductor"
    small = False
    """Whether sizes and counts are to be as small as will do."""

    def seconds(self, run: Callable[[], object]) -> float:
        """How long the device takes for one call, the gaps where it waits for Python included."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Most memory in use since the last `forget_peak`."""
        return torch.cuda.max_memory_allocated()

    def forget_peak(self) -> None:
        """Start anew, and give back what nobody uses."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def forbid_reads(self) -> Generator[None, None, None]:
        """Whatever waits for the device raises RuntimeError."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compile(self, module: torch.nn.Module) -> None:
        """Compile a module in place; it is the caller's, and traced at its next call."""
        module.compile(backend=self.compiler)

    def medians(
        self, alternatives: dict[str, Callable[[], object]], *, seconds: float = 0.6
    ) -> dict[str, float]:
        """Median seconds of each alternative, one run of each in turn.

        Args:
            alternatives: what to run, by name.
            seconds: for all of them together; three turns at least, and two before.
        """
        for run in (*alternatives.values(), *alternatives.values()):
            run()
        times: dict[str, list[float]] = {name: [] for name in alternatives}
        end = time.monotonic() + seconds
        while len(next(iter(times.values()))) < 3 or (not self.small and time.monotonic() < end):
            for name, run in alternatives.items():
                times[name].append(self.seconds(run))
        return {name: statistics.median(values) for name, values in times.items()}


class NoCard(Card):
    """The CPU in its place, in a dry run."""

    device = torch.device("cpu")
    compiler = "eager"  # dynamo traces as it does; nothing is generated
    small = True

    def seconds(self, run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def forget_peak(self) -> None:
        pass

    @contextmanager
    def forbid_reads(self) -> Generator[None, None, None]:
        yield


def find_card(*, dry: bool) -> Card:
    """The first CUDA device; without one there is nothing to measure."""
    torch.set_num_threads(1 if dry else torch.get_num_threads())
    if dry:
        return NoCard()
    if not torch.cuda.is_available():
        raise NotHereError("no CUDA device")
    torch.cuda.set_device(0)
    return Card()
