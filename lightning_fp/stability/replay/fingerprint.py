"""Hashes of what a training step can change: to see what was changed, without a copy of it.

Values are looked at in whatever they are kept: attributes, lists and dicts, modules, objects of the
user's own classes, class attributes, globals of the user's files. What cannot be looked into, such
as an open file, counts by its identity and is listed.
"""

from __future__ import annotations

import ctypes
import random
import re
import sys
import types
import zlib
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_fp.layers import is_switchable

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), range),
    *(torch.dtype, torch.device, torch.Size, PurePath, re.Pattern, Enum),
)
"""What does not change, and is what it shows."""

_CODE = (
    type,
    property,
    staticmethod,
    classmethod,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MappingProxyType,
)
"""What is part of a program and not of its state."""

_LIBRARIES = frozenset(
    (
        *sys.stdlib_module_names,
        *("torch", "torchvision", "torchaudio", "torchmetrics", "torchao", "torchdata"),
        *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"),
        *("lightning_fp", "numpy", "typing_extensions"),
    )
) - {"__main__"}
"""Packages whose classes and modules have no state of a user's training step."""

_QUIET = frozenset(("lightning", "pytorch_lightning", "lightning_fp", "logging", "weakref"))
"""Packages whose objects are not worth a line: the Trainer, loggers."""

_DEPTH = 8
_MOST_ITEMS = 4096
"""Of a container with more only the length and the ends count."""

_MOST_VALUES = 100_000
"""Values that are looked at in all; a few hundred milliseconds."""

_MOST_GLOBAL_BYTES = 2**26
"""Tensors among globals that are larger are data."""

_GLOBAL = "the global of "

_OF_TORCH = frozenset(vars(nn.Module())) | frozenset(vars(Optimizer([torch.zeros(1)], {})))


@dataclass(frozen=True, kw_only=True, order=True)
class Item:
    """Something that a step may change."""

    owner: str
    """Class of the object it belongs to; empty for what is there once in a run."""

    what: str
    """In words, e.g. "self.ema"."""

    def said(self, by: str = "") -> str:
        """In a sentence about `by`, where it need not be said whose it is."""
        return self.what if self.owner in ("", by) else f"{self.what} of {self.owner}"


class Fingerprint:
    """Takes hashes of values.

    Args:
        wanted: whether to hash an item; the others are passed over.
    """

    def __init__(self, wanted: Callable[[Item], bool] = lambda _: True) -> None:
        self._wanted = wanted
        self._hashes: dict[Item, Hashable] = {}
        self._waiting: dict[torch.device, list[tuple[Item, Tensor]]] = {}
        self._seen: set[int] = set()
        self._left = _MOST_VALUES
        self._foreign = False
        self.globals: dict[Item, object] = {}
        """Copies of the plain containers among globals, to see what was merely appended to."""
        self.not_looked_at: dict[str, None] = {}
        """What could not be looked into, in words, in the order it was met."""

    def hashes(self) -> dict[Item, Hashable]:
        """By item; waits for devices once each."""
        for sums in self._waiting.values():
            values: list[list[int]] = torch.stack([each for _, each in sums]).tolist()
            for (item, _), value in zip(sums, values, strict=True):
                self._hashes[item] = (self._hashes[item], tuple(value))
        self._waiting.clear()
        return self._hashes

    # -- what to look at ------------------------------------------------------------------------

    def add(self, owner: str, what: str, value: object) -> None:
        """One value, with all that is in it.

        Args:
            owner: see `Item`.
            what: see `Item`.
            value: a tensor, a number, a container, an object.
        """
        self._look(owner, what, value, _DEPTH)

    def whole(self, what: str, value: object) -> None:
        """One value as a single item, whatever it is made of.

        Args:
            what: see `Item`.
            value: see `add`.
        """
        item = Item(owner="", what=what)
        if self._wanted(item):
            parts = Fingerprint()
            parts.add("", "", value)
            self._hashes[item] = tuple(parts.hashes().items())

    def attributes(
        self, owner: object, *, skip: Collection[str] = (), list_unseen: bool = True
    ) -> None:
        """All attributes of an object, and what is in them.

        Args:
            owner: the object; of a module its submodules' as well, but neither Parameters nor
                buffers.
            skip: attributes to pass over.
            list_unseen: whether what cannot be looked into is listed.
        """
        name = type(owner).__name__
        if isinstance(owner, nn.Module):
            self._seen.update(id(module) for module in owner.modules())
            for path, module in owner.named_modules():
                if not is_switchable(module):  # the table's, with its histories
                    prefix = f"self.{path}" if path else "self"
                    self._vars(name, prefix, vars(module), _DEPTH, skip, list_unseen)
            return
        self._seen.add(id(owner))
        self._vars(name, "self", vars(owner), _DEPTH, skip, list_unseen)

    def code_of(self, objects: Collection[object]) -> None:
        """Class attributes, and globals of the files that the objects' classes are from.

        Args:
            objects: modules, callbacks and the like; classes of libraries are passed over.
        """
        every = (cls for each in objects for cls in type(each).__mro__)
        classes = {cls: None for cls in every if not (_known(cls) or _is_foreign(cls))}
        for cls in classes:
            self._vars(cls.__name__, "", _data(vars(cls)), _DEPTH, (), False)
        for name in dict.fromkeys(cls.__module__ for cls in classes):
            module = sys.modules.get(name)
            if module is not None:
                self._vars("", f"{_GLOBAL}{name}", _data(vars(module)), _DEPTH, (), False)

    # -- how ------------------------------------------------------------------------------------

    def _vars(
        self,
        owner: str,
        prefix: str,
        attributes: Mapping[str, object],
        depth: int,
        skip: Collection[str],
        list_unseen: bool,
    ) -> None:
        join = " " if prefix.startswith("the ") else "." if prefix else ""
        for name, value in list(attributes.items()):
            if name not in _OF_TORCH and name not in skip:
                self._look(owner, f"{prefix}{join}{name}", value, depth, list_unseen)

    def _look(
        self, owner: str, what: str, value: Any, depth: int, list_unseen: bool = True
    ) -> None:
        if isinstance(value, (*_CODE, Optimizer)) or id(value) in self._seen:
            return
        item, self._left = Item(owner=owner, what=what), self._left - 1
        if self._left <= 0:
            self.not_looked_at[f"what comes after {_MOST_VALUES} values"] = None
        elif isinstance(value, Tensor):
            self._tensor(item, value)
        elif (known := _known_hash(value)) is not None:
            self._put(item, known)
        elif isinstance(value, (Mapping, list, tuple, deque, Set)):
            self._container(item, value, depth, list_unseen)
        elif isinstance(value, nn.Module):
            self._module(item, value, depth, list_unseen)
        elif depth and hasattr(value, "__dict__") and not _known(type(value)):
            self._object(item, value, depth, list_unseen)
        else:
            self._put(item, lambda: id(value))
            if list_unseen and not callable(value) and not _quiet(type(value)):
                self.not_looked_at[f"{item.said()} ({type(value).__name__})"] = None

    def _object(self, item: Item, value: Any, depth: int, list_unseen: bool) -> None:
        """Of an installed package's only the tensors: loggers and the like count and tick."""
        self._seen.add(id(value))
        self._put(item, lambda: id(value))
        outer, self._foreign = self._foreign, self._foreign or _is_foreign(type(value))
        if self._foreign and not outer and list_unseen:
            self.not_looked_at[f"{item.said()} ({type(value).__name__}) but for its tensors"] = None
        self._vars(
            item.owner, item.what, vars(value), depth - 1, (), list_unseen and not self._foreign
        )
        self._foreign = outer

    def _put(self, item: Item, hashed: Callable[[], Hashable]) -> None:
        if not self._foreign and self._wanted(item):
            self._hashes[item] = hashed()

    def _container(self, item: Item, value: Any, depth: int, list_unseen: bool) -> None:
        head = (type(value).__name__, len(value))
        if _is_plain(value, depth):
            self._put(item, lambda: (*head, zlib.crc32(_text(value))))
            if is_global(item) and self._wanted(item):
                self.globals[item] = deepcopy(value)
            return
        if len(value) > _MOST_ITEMS or not depth or isinstance(value, Set):
            parts = list(value)
            self._put(item, lambda: (*head, id(parts[0]), id(parts[-1])))
            return
        self._seen.add(id(value))
        self._put(item, lambda: head)
        keyed = isinstance(value, Mapping)
        keys = list(value) if keyed else range(len(value))
        for key, each in zip(keys, list(value.values()) if keyed else list(value), strict=True):
            key = repr(key) if type(key) in _PLAIN else type(key).__name__
            self._look(item.owner, f"{item.what}[{key}]", each, depth - 1, list_unseen)

    def _module(self, item: Item, value: nn.Module, depth: int, list_unseen: bool) -> None:
        """One that is no part of the model: an average, a teacher in a list, a metric."""
        self._seen.update(id(module) for module in value.modules())
        self._put(item, lambda: id(value))
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            self._tensor(Item(owner=item.owner, what=f"{item.what}.{name}"), tensor)
        for path, module in value.named_modules():
            prefix = f"{item.what}.{path}" if path else item.what
            self._vars(item.owner, prefix, vars(module), depth - 1, (), list_unseen)

    def _tensor(self, item: Item, value: Tensor) -> None:
        if not self._wanted(item):
            return
        head = (str(value.dtype), tuple(value.shape), str(value.device), value.requires_grad)
        parts: list[Hashable] = []
        for part in _strided(value.detach()):
            if part.device.type == "cpu":
                parts.append(_crc(part))
            else:
                self._waiting.setdefault(part.device, []).append((item, _sums(part)))
        self._hashes[item] = (head, *parts)


def is_global(item: Item) -> bool:
    """Whether it is among the globals of a user's file."""
    return item.what.startswith(_GLOBAL)


def only_grown(before: object, after: object) -> bool:
    """Whether lists have been appended to, here or in dicts, and all else is as it was.

    >>> only_grown({"losses": [1.0]}, {"losses": [1.0, 2.0]})
    True
    """
    if isinstance(before, list) and isinstance(after, list):
        return before == after[: len(before)]
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        alike = before.keys() == after.keys()
        return alike and all(only_grown(value, after[key]) for key, value in before.items())
    return before == after


def changed(before: Mapping[Item, Hashable], after: Mapping[Item, Hashable]) -> list[Item]:
    """What is not as it was, is new or is gone; in the order of `before`, what is new last."""
    items = dict.fromkeys((*before, *after))
    return [item for item in items if before.get(item, items) != after.get(item, items)]


def _known(cls: type, packages: frozenset[str] = _LIBRARIES) -> bool:
    return cls.__module__.partition(".")[0] in packages


def _is_foreign(cls: type) -> bool:
    """Whether a class is an installed package's, and not the user's own, as a notebook's are."""
    if cls.__module__ == "__main__":  # whose file is that of the launcher
        return False
    file = str(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")
    return "site-packages" in file or "dist-packages" in file


def _quiet(cls: type) -> bool:
    return _known(cls, _QUIET) or cls.__module__.startswith("torch.distributed")


def _data(namespace: Mapping[str, object]) -> dict[str, object]:
    """What of a class or a file is no code, and small."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("__")
        and not callable(value)
        and not hasattr(type(value), "__get__")
        and not (isinstance(value, Tensor) and value.nbytes > _MOST_GLOBAL_BYTES)
    }


def _known_hash(value: Any) -> Callable[[], Hashable] | None:
    """How to hash what is no tensor and has no parts that count; None for all else."""
    if isinstance(value, _PLAIN):
        return lambda: (type(value).__name__, repr(value))
    if isinstance(value, torch.Generator):
        return lambda: _crc(value.get_state())
    if isinstance(value, random.Random):
        return lambda: hash(value.getstate())
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.ndarray) and value.dtype.kind != "O":
        return lambda: (str(value.dtype), value.shape, zlib.crc32(value.tobytes()))
    if isinstance(value, numpy.random.Generator):
        return lambda: repr(value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return lambda: zlib.crc32(repr(value.get_state(legacy=False)).encode())
    return None


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if not depth or not isinstance(value, (Mapping, list, tuple, deque, Set)):
        return False
    parts = (*value, *value.values()) if isinstance(value, Mapping) else value
    return len(value) <= _MOST_ITEMS and all(_is_plain(part, depth - 1) for part in parts)


def _text(value: Any) -> bytes:
    """Of a plain container; of a set in whatever order it is."""
    if isinstance(value, Set):
        return repr(sorted(map(repr, value))).encode()
    return repr(list(value.items()) if isinstance(value, Mapping) else list(value)).encode()


def _strided(value: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of, each with memory of its own."""
    if is_traceable_wrapper_subclass(value):  # DTensor, low-bit optimizer states
        for name in value.__tensor_flatten__()[0]:
            part = getattr(value, name)
            if isinstance(part, Tensor):  # of a DTensor the device mesh is one too
                yield from _strided(part)
    elif value.is_sparse:
        whole = value.coalesce()
        yield from (whole.indices(), whole.values())
    elif value.layout is torch.strided and not value.is_meta and not value.is_quantized:
        yield value.resolve_conj().resolve_neg().contiguous()


def _crc(value: Tensor) -> int:
    """Of a contiguous tensor in host memory, where it lies: 1.3 GB a second."""
    size = value.numel() * value.element_size()
    return zlib.crc32((ctypes.c_char * size).from_address(value.data_ptr())) if size else 0


_WIDTH = 4096


def _sums(value: Tensor) -> Tensor:
    """int64 [4] on the device: the sum of all words, weighted by row and by column, and the rest.

    Integer sums are the same in any order, and any single change changes them.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    value = torch.view_as_real(value) if value.is_complex() else value
    flat = value.reshape(-1).view(words[value.element_size()])
    rows = flat.numel() // _WIDTH
    body, rest = flat[: rows * _WIDTH].view(rows, _WIDTH), flat[rows * _WIDTH :]
    by_row, by_column = body.sum(1, dtype=torch.int64), body.sum(0, dtype=torch.int64)
    count = torch.arange(1, max(rows, _WIDTH) + 1, device=flat.device)
    return torch.stack(
        [
            by_row.sum(),
            (by_row * count[:rows]).sum(),
            (by_column * count[:_WIDTH]).sum(),
            (rest.to(torch.int64) * count[: rest.numel()]).sum(),
        ]
    )
