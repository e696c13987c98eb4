"""Fingerprints: every change is seen and named, and nothing else."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig

from lightning_fp.stability.replay.fingerprint import Fingerprint, Item, _sums, changed


@dataclass
class Inner:
    count: int = 0
    weights: Tensor = field(default_factory=lambda: torch.zeros(3))


class Holder:
    """One attribute of each kind."""

    of_class: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.number, self.text, self.nothing = 1.5, "a", None
        self.nan = float("nan")
        self.tensor = torch.arange(6.0).view(2, 3)
        self.half = torch.ones(5, dtype=torch.bfloat16)
        self.eight = torch.ones(5).to(torch.float8_e4m3fn)
        self.sparse = torch.eye(3).to_sparse()
        self.empty = torch.empty(0)
        self.array = np.arange(4)
        self.items: list[Any] = [1, [torch.zeros(2)], {"key": Inner()}]
        self.ordered = OrderedDict(a=1)
        self.queue = deque([1.0, 2.0], maxlen=2)
        self.names = {"x", "y"}
        self.inner = Inner()
        self.module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.generator = torch.Generator().manual_seed(0)
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)
        self.itself = self
        self.call = print


def look(holder: Holder) -> Fingerprint:
    taken = Fingerprint()
    taken.attributes(holder)
    taken.code_of([holder])
    taken.hashes()
    return taken


CHANGES: dict[str, Callable[[Holder], Any]] = {
    "self.number": lambda h: setattr(h, "number", 2.5),
    "self.text": lambda h: setattr(h, "text", "b"),
    "self.nothing": lambda h: setattr(h, "nothing", 0),
    "self.nan": lambda h: setattr(h, "nan", 0.0),
    "self.tensor": lambda h: h.tensor[1].add_(1),
    "self.half": lambda h: h.half.neg_(),
    "self.eight": lambda h: h.eight.fill_(2),
    "self.sparse": lambda h: setattr(h, "sparse", 2 * h.sparse),
    "self.empty": lambda h: setattr(h, "empty", torch.empty(0, 1)),
    "self.array": lambda h: h.array.__setitem__(0, 7),
    "self.items": lambda h: h.items.append(None),
    "self.items[1][0]": lambda h: h.items[1][0].add_(1),
    "self.items[2]['key'].count": lambda h: setattr(h.items[2]["key"], "count", 1),
    "self.ordered": lambda h: h.ordered.update(b=1),
    "self.queue": lambda h: h.queue.append(3.0),
    "self.names": lambda h: h.names.add("z"),
    "self.inner.weights": lambda h: h.inner.weights.add_(1),
    "self.module.0.weight": lambda h: h.module[0].weight.data.add_(1),
    "self.module.1.running_mean": lambda h: h.module[1].running_mean.add_(1),
    "self.generator": lambda h: torch.rand(1, generator=h.generator),
    "self.python": lambda h: h.python.random(),
    "self.numpy": lambda h: h.numpy.random(),
    "self.new": lambda h: setattr(h, "new", 1),
    "of_class": lambda h: h.of_class.append(1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_seen_and_named(what: str) -> None:
    holder = Holder()
    before = look(holder).hashes()
    assert changed(before, look(holder).hashes()) == []
    CHANGES[what](holder)
    found = changed(before, look(holder).hashes())
    holder.of_class.clear()
    assert found[0] == Item(owner="Holder", what=what)
    assert [item.what for item in found[1:]] == (["self.items[3]"] if what == "self.items" else [])


def test_what_is_gone_is_a_change() -> None:
    holder = Holder()
    before = look(holder).hashes()
    del holder.number
    assert [item.what for item in changed(before, look(holder).hashes())] == ["self.number"]


def test_only_some_items_are_hashed() -> None:
    holder = Holder()
    wanted = [Item(owner="Holder", what="self.tensor"), Item(owner="Holder", what="self.gone")]
    taken = Fingerprint(wanted.__contains__)
    taken.attributes(holder)
    assert list(taken.hashes()) == wanted[:1]


def test_what_cannot_be_looked_into_is_listed_and_counts_by_identity() -> None:
    class Slotted:
        __slots__ = ("value",)

    holder: Any = Holder()
    holder.slotted, holder.file = Slotted(), iter([1, 2])
    holder.module.trainer_like = None
    taken = look(holder)
    assert list(taken.not_looked_at) == [
        "self.slotted of Holder (Slotted)",
        "self.file of Holder (list_iterator)",
    ]
    holder.slotted.value = 1
    assert changed(taken.hashes(), look(holder).hashes()) == []
    holder.slotted = Slotted()
    assert [i.what for i in changed(taken.hashes(), look(holder).hashes())] == ["self.slotted"]


def test_of_an_installed_packages_object_only_the_tensors_count() -> None:
    holder: Any = Holder()
    holder.config = LlamaConfig()
    holder.config.shadow = [torch.zeros(2)]
    taken = look(holder)
    before = taken.hashes()
    assert "self.config of Holder (LlamaConfig) but for its tensors" in taken.not_looked_at
    holder.config.ticks = 1
    assert changed(before, look(holder).hashes()) == []
    holder.config.shadow[0] += 1
    found = changed(before, look(holder).hashes())
    assert [item.what for item in found] == ["self.config.shadow[0]"]
    holder.config = 3
    assert "self.config" in [item.what for item in changed(before, look(holder).hashes())]


def test_a_container_that_is_long_counts_by_its_length_and_ends() -> None:
    holder: Any = Holder()
    holder.items = [object() for _ in range(10_000)]
    before = look(holder).hashes()
    holder.items.append(None)
    assert [item.what for item in changed(before, look(holder).hashes())] == ["self.items"]


def test_in_a_sentence() -> None:
    item = Item(owner="Average", what="self.ema")
    assert item.said() == "self.ema of Average"
    assert item.said("Average") == "self.ema"
    assert Item(owner="", what="the buffer mean").said() == "the buffer mean"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("size", [1, 5, 4096, 10_000])
def test_sums_on_a_device_see_each_single_change_and_each_exchange(
    dtype: torch.dtype, size: int
) -> None:
    value = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = _sums(value)
    assert torch.equal(before, _sums(value.clone()))
    for place in {0, size // 2, size - 1}:
        other = value.clone()
        other[place] = 0 if bool(other[place]) else 1
        assert not torch.equal(before, _sums(other))
    turned = value.flip(0)
    assert torch.equal(turned, value) or not torch.equal(before, _sums(turned))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50), st.integers(0, 49))
def test_tensors_are_the_same_if_their_bits_are(values: list[float], place: int) -> None:
    def hashed(tensor: Tensor) -> Any:
        taken = Fingerprint()
        taken.add("", "x", tensor)
        return taken.hashes()

    one = torch.tensor(values)
    other = one.clone()
    other[place % len(values)] += 1.0
    same = torch.equal(one, other)
    assert (hashed(one) == hashed(other)) == same
    assert hashed(one) == hashed(one.repeat(2, 1)[0])
    assert hashed(one) != hashed(one.double())
