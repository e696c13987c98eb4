"""Copies of many tensors in one piece of host memory, exact bit for bit.

One piece, because it can be used again as a whole, and because the allocator of pinned memory
rounds each tensor up to a power of two.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes; of a cache line, and enough for every dtype."""

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all devices."""

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Which tensors lie in a piece of memory."""

    specs: tuple[Spec, ...]
    """dtype and shape of each."""

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Layout:
        """The layout for copies of these."""
        return cls(tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors))

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each, with what aligns the next."""
        return [
            -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            for dtype, shape in self.specs
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(self.sizes)


class HostMemory:
    """Room for copies of tensors; pinned if it is to be filled from CUDA.

    Copies from CUDA are asynchronous. Those of tensors that only an optimizer's step writes go
    over a stream of their own, beside the next forward and backward: before the step that writes
    them, `wait_for_copies`.

    Args:
        layout: which tensors.
        pinned: whether to register the memory with CUDA.
        content: uint8 [layout.nbytes], to take over; else new memory.
    """

    def __init__(
        self, layout: Layout, *, pinned: bool = False, content: Tensor | None = None
    ) -> None:
        self.content = torch.empty(layout.nbytes, dtype=torch.uint8) if content is None else content
        """uint8, all that is kept."""
        self.pinned = pinned
        self._events: list[Any] = []
        self._copies: list[tuple[Any, Any]] = []
        if pinned:
            _pin(self)
        self._arrange(layout)

    def _arrange(self, layout: Layout) -> None:
        self.layout = layout
        self._views: list[Tensor] = []
        start = 0
        for (dtype, shape), size in zip(layout.specs, layout.sizes, strict=True):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            view = self.content[start : start + nbytes]
            self._views.append(view.view(_copied_as(dtype)).view(shape))
            start += size

    def reused(self, layout: Layout, *, pinned: bool) -> bool:
        """Make room for other tensors in the same memory, if it is as large as they need."""
        if layout.nbytes != self.content.numel() or pinned != self.pinned:
            return False
        if layout != self.layout:
            self.synchronize()
            self._arrange(layout)
        return True

    @torch.no_grad()
    def store(self, tensors: Sequence[Tensor], stepped: Container[int] = ()) -> None:
        """Copy tensors into the memory.

        Args:
            tensors: as in the layout.
            stepped: the `id` of those that nothing but an optimizer's step writes.
        """
        self.synchronize()
        pairs = [
            (view, _as_copied(tensor)) for view, tensor in zip(self._views, tensors, strict=True)
        ]
        on_cuda = _on_cuda(tensors)
        self._copies = []
        if not on_cuda:
            _copy(pairs)
            return
        _copy([pair for pair, t in zip(pairs, tensors, strict=True) if not t.is_cuda])
        # Buffers may be written by the very next forward: they are copied on the stream that it
        # runs on, before it. Parameters and states of optimizers stay as they are until the step,
        # and the copy of these, which is most, goes beside forward and backward.
        for device, indices in on_cuda.items():
            present, side = torch.cuda.current_stream(device), _side_stream(device)
            beside = [index for index in indices if id(tensors[index]) in stepped]
            alone = set(beside)
            _copy([pairs[index] for index in indices if index not in alone])
            side.wait_stream(present)
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record(side)
            with torch.cuda.stream(side):
                _copy([pairs[index] for index in beside])
            ended.record(side)
            self._copies.append((began, ended))
            for index in beside:  # freed memory must wait for the copy
                tensors[index].record_stream(side)
            self._events.append(ended)

    @property
    def copy_seconds(self) -> float | None:
        """What the last copy from CUDA took, beside the run; None where there was none.

        Waits until it is done.
        """
        if not self._copies:
            return None
        self.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in self._copies) / 1e3

    @torch.no_grad()
    def load(self, tensors: Sequence[tuple[Tensor, int]]) -> None:
        """Copy back, in place.

        Args:
            tensors: where to, and the number of the copy in the layout.
        """
        self.synchronize()
        wait_for_copies()
        # torch refuses to write into inference tensors outside of inference mode.
        for inference in (False, True):
            pairs = [
                _writable(_as_copied(tensor), self._views[index])
                for tensor, index in tensors
                if tensor.is_inference() == inference
            ]
            with torch.inference_mode(inference), torch.no_grad():
                _copy(pairs)
        for device in _on_cuda([tensor for tensor, _ in tensors]):
            self._events.append(torch.cuda.current_stream(device).record_event())

    @torch.no_grad()
    def new(self, index: int, device: str) -> Tensor:
        """A new tensor of the contents of one copy."""
        self.synchronize()
        dtype, _ = self.layout.specs[index]
        return self._views[index].to(device, copy=True).view(dtype)

    def synchronize(self) -> None:
        """Wait until the copies from and to CUDA are done."""
        for event in self._events:
            event.synchronize()
        self._events.clear()


def wait_for_copies() -> None:
    """Let what runs on CUDA from now on wait for all copies under way; the host does not wait."""
    for device, side in _side_streams.items():
        torch.cuda.current_stream(device).wait_stream(side)


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]


def _on_cuda(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    devices: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.is_cuda:
            devices.setdefault(tensor.device, []).append(index)
    return devices


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Into the first of each pair; asynchronously between CUDA and pinned memory."""
    if pairs:
        into, of = zip(*pairs, strict=True)
        torch._foreach_copy_(list(into), list(of), non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


def _copied_as(dtype: torch.dtype) -> torch.dtype:
    """Not every 8-bit float can be copied."""
    return torch.uint8 if dtype.itemsize == 1 and dtype.is_floating_point else dtype


def _as_copied(tensor: Tensor) -> Tensor:
    dtype = _copied_as(tensor.dtype)
    return tensor if dtype is tensor.dtype else tensor.detach().view(dtype)


def _writable(into: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """The same copy, into each place once and without conjugation."""
    for dim, stride in enumerate(into.stride()):
        if stride == 0 and into.shape[dim] > 1:  # expanded: one element in many places
            into, of = into.narrow(dim, 0, 1), of.narrow(dim, 0, 1)
    return (into.conj(), of.conj()) if into.is_conj() else (into, of)


def _pin(memory: HostMemory) -> None:
    content = memory.content
    if not content.numel():
        return
    # Where it cannot be pinned, copies are slower, and no less right.
    cudart: Any = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(content.data_ptr(), content.numel(), _PORTABLE)) == 0:
        finalizer = weakref.finalize(memory, _unpin, content, memory._events)
        finalizer.atexit = False  # the process's end frees it


def _unpin(content: Tensor, events: list[Any]) -> None:
    # Memory may not go while the device still copies into it.
    for event in events:
        event.synchronize()
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(content.data_ptr())
