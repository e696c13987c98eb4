"""State as a tree of plain values, its tensors apart: to be copied, kept, saved and put back.

Every node is a tuple of its kind and its content, so that a tree of plain values can be saved in a
checkpoint that loads with `weights_only=True`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_fp.stability.keep.host_memory import HostMemory

Tree = tuple[Any, ...]
"""("tensor", number, device), ("wrapper", class, {name: tree}, number), ("dict" | "ordered",
[[key, tree]]), ("list" | "tuple", [tree]), ("value", plain value) or ("object", any)."""

_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device))


@dataclass(frozen=True, kw_only=True)
class WrappedTensor:
    """How a tensor made of tensors is put together: a DTensor, a low-bit optimizer state."""

    kind: Any
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    attributes: dict[str, Any]
    """What is inside besides tensors, such as the device mesh."""


class TensorCollector:
    """The tensors of some trees, each once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.wrapped: list[WrappedTensor] = []
        self._numbers: dict[int, int] = {}

    def tree(self, value: Any) -> Tree:
        """The tree of a value; what is neither a tensor nor plain in it is copied now."""
        kind = type(value)
        if kind in _PLAIN:
            return ("value", value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind in (dict, OrderedDict) and all(map(_is_plain_key, value)):
            name = "dict" if kind is dict else "ordered"
            return (name, [[key, self.tree(item)] for key, item in value.items()])
        if kind in (list, tuple):
            return (kind.__name__, [self.tree(item) for item in value])
        return ("object", copy.deepcopy(value))

    def _tensor(self, value: Tensor) -> Tree:
        if is_traceable_wrapper_subclass(value):
            # Of a Parameter too this is the tensor inside, which shares its storage.
            inside, attributes = _inside(value)
            self.wrapped.append(
                WrappedTensor(
                    kind=type(value),
                    context=value.__tensor_flatten__()[1],
                    size=value.size(),
                    stride=value.stride(),
                    attributes=attributes,
                )
            )
            inner = {name: self._tensor(tensor) for name, tensor in inside.items()}
            return ("wrapper", type(value).__name__, inner, len(self.wrapped) - 1)
        if value.layout is not torch.strided or value.is_quantized:
            return ("object", value.detach().clone())
        # Tied weights are one tensor and one copy. An `id` stays its own while the list holds it.
        number = self._numbers.setdefault(id(value), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(value)
        return ("tensor", number, str(value.device))


def is_plain(tree: Any) -> bool:
    """Whether it can be saved: it has no object of a class that a checkpoint may not load."""
    if isinstance(tree, tuple) and tree and tree[0] == "object":
        return False
    if isinstance(tree, dict):
        return all(map(is_plain, tree.values()))
    return not isinstance(tree, (list, tuple)) or all(map(is_plain, tree))


class TreeRestorer:
    """Values of trees again, in the tensors of now wherever these fit.

    Nothing is written before `write`.

    Args:
        memory: the copies.
        wrapped: as of `TensorCollector`; empty if they were loaded from a checkpoint.
    """

    def __init__(self, memory: HostMemory, wrapped: list[WrappedTensor]) -> None:
        self._memory, self._wrapped = memory, wrapped
        self._into: dict[int, tuple[Tensor, int]] = {}
        self._made: dict[int, Tensor] = {}

    def value(self, tree: Tree, now: Any = None) -> Any:
        """What the tree stands for.

        Args:
            tree: the tree.
            now: what is in its place; its tensors of the same shape, dtype and device are kept,
                and written into by `write`.
        """
        kind, content = tree[0], tree[1]
        if kind in ("dict", "ordered"):
            before: dict[Any, Any] = now if isinstance(now, dict) else {}
            items = [(key, self.value(item, before.get(key))) for key, item in content]
            return dict(items) if kind == "dict" else OrderedDict(items)
        if kind in ("list", "tuple"):
            old = list(now) if isinstance(now, (list, tuple)) else []
            old += [None] * (len(content) - len(old))
            new = [self.value(item, was) for item, was in zip(content, old, strict=False)]
            return new if kind == "list" else tuple(new)
        if kind == "tensor":
            if content not in self._made:
                fits = isinstance(now, Tensor) and str(now.device) == tree[2]
                kept = fits and self.fill(tree, now)
                self._made[content] = now if kept else self._memory.new(content, tree[2])
            return self._made[content]
        if kind == "wrapper":
            return now if isinstance(now, Tensor) and self.fill(tree, now) else self._wrap(tree)
        return copy.deepcopy(content)

    def fill(self, tree: Tree, now: Tensor) -> bool:
        """Have a tensor of now written into.

        Returns:
            Whether it can be: its shape and dtype fit, and nothing else is to be written there.
        """
        if tree[0] == "wrapper":
            if type(now).__name__ != tree[1] or not is_traceable_wrapper_subclass(now):
                return False
            inside, _ = _inside(now)
            if inside.keys() != tree[2].keys():
                return False
            return all(self.fill(inner, inside[name]) for name, inner in tree[2].items())
        if tree[0] != "tensor" or is_traceable_wrapper_subclass(now):
            return False
        spec = (now.dtype, tuple(now.shape))
        if spec != self._memory.layout.specs[tree[1]] or now.layout is not torch.strided:
            return False
        # Tensors that were two and are one now cannot take two contents.
        return self._into.setdefault(id(now), (now, tree[1]))[1] == tree[1]

    def write(self) -> None:
        """Copy into the tensors that were kept."""
        self._memory.load(list(self._into.values()))

    def _wrap(self, tree: Tree) -> Tensor:
        _, name, inner, number = tree
        if number >= len(self._wrapped):
            raise ValueError(
                f"a {name} must be there to be restored from a checkpoint, got none of that shape;"
                " restore the model and the optimizers from the checkpoint first"
            )
        wrapped = self._wrapped[number]
        tensors = {name: self.value(part) for name, part in inner.items()}
        return wrapped.kind.__tensor_unflatten__(
            {**tensors, **wrapped.attributes}, wrapped.context, wrapped.size, wrapped.stride
        )


def _inside(value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors a tensor is made of, and what else it is made of."""
    names, _ = value.__tensor_flatten__()
    parts = {name: getattr(value, name) for name in names}
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    return tensors, {name: part for name, part in parts.items() if name not in tensors}


def _is_plain_key(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_plain_key, key))
    return type(key) in _PLAIN
