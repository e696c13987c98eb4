"""Flags on their way from the device to the host, read a batch later, when they have arrived."""

from __future__ import annotations

import torch
from torch import Tensor


class LateFlags:
    """What the device found out about a step, for a host that does not wait for it.

    On CUDA the copy is asynchronous. What is on the host already is there at once, and is read at
    the same place all the same.
    """

    def __init__(self) -> None:
        self._new: list[_Flag] = []
        self._due: list[_Flag] = []

    def put(self, flag: Tensor) -> None:
        """Send off a flag of the batch that runs.

        Args:
            flag: bool scalar, on any device.
        """
        self._new.append(_Flag(flag))

    def next_batch(self) -> None:
        """What has been sent off until now may be read from now on."""
        self._due += self._new
        self._new = []

    def already(self) -> bool:
        """Whether any is true, of those that have arrived; this differs between ranks."""
        return any(flag.arrived() and flag.read() for flag in self._due)

    def take(self) -> bool:
        """Whether any was true in the batches before this one. It waits for these at most."""
        found = [flag.read() for flag in self._due]
        self._due = []
        return any(found)


class _Flag:
    """One of them."""

    def __init__(self, flag: Tensor) -> None:
        self._value = flag
        self._ready: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def arrived(self) -> bool:
        return self._ready is None or self._ready.query()

    def read(self) -> bool:
        if self._ready is not None:
            self._ready.synchronize()
        return bool(self._value)
