"""The signals of each step over all ranks, on the host: one queue, any number of readers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_fp.stability.detect.signals import SignalQueue, StepSignals
from lightning_fp.telemetry.board import MOST_KEPT
from lightning_fp.telemetry.step_record import StepRecord


class SignalFeed:
    """Brings records to the host without waiting for the device, once for all who read.

    Args:
        on_arrival: told each step's signals as they arrive.
    """

    def __init__(self, on_arrival: Callable[[StepSignals], object]) -> None:
        self._queue = SignalQueue()
        self._on_arrival = on_arrival
        self._readers: list[SignalReader] = []
        self._failed = False

    def reader(self) -> SignalReader:
        """One who reads all signals from here on."""
        reader = SignalReader(self)
        self._readers.append(reader)
        return reader

    @property
    def wanted(self) -> bool:
        """Whether anybody reads; alike on all ranks."""
        return bool(self._readers)

    def put(self, record: StepRecord, headroom: Tensor | None, device: torch.device) -> None:
        """Add a step; one collective if distributed.

        Args:
            record: of this rank.
            headroom: float32 [layers, operands] in bits; None where there is no table.
            device: where collectives run.
        """
        self._queue.put(
            record.step,
            loss=record.loss,
            grad_norms=record.grad_norms,
            skipped=record.skipped,
            headroom=headroom,
            lr=record.lr,
            device=device,
            failed=self._failed,
        )

    def fail(self) -> None:
        """Who watches has failed on this rank: all ranks hear of it with the next signals."""
        self._failed = True

    def arrive(self, *, all: bool = False) -> None:
        """Hand on what can be read without waiting; all, and wait for it, if asked to."""
        for signals in self._queue.take(all=all):
            self._on_arrival(signals)
            for reader in self._readers:
                reader.seen.append(signals)


class SignalReader:
    """Keeps signals until they are taken; of very many the oldest are dropped.

    Args:
        feed: where they come from.
    """

    def __init__(self, feed: SignalFeed) -> None:
        self.seen: deque[StepSignals] = deque(maxlen=MOST_KEPT)
        """What has arrived."""
        self._feed = feed

    def fail(self) -> None:
        """See `SignalFeed.fail`."""
        self._feed.fail()

    def take(self, *, all: bool = False) -> list[StepSignals]:
        """The steps that can be read without waiting, oldest first.

        Args:
            all: whether to wait for the last one too.
        """
        self._feed.arrive(all=all)
        taken = list(self.seen)
        self.seen.clear()
        return taken
