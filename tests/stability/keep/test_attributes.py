"""Plain attributes go back with a snapshot, into the objects that are there."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_fp.stability import restore, take
from lightning_fp.stability.keep.attributes import Attributes
from lightning_fp.stability.keep.snapshot import Snapshot


def owner() -> SimpleNamespace:
    return SimpleNamespace(
        steps=3,
        name="a",
        rate=0.5,
        none=None,
        bank=torch.arange(3.0),
        averages={"w": torch.ones(2), "deep": [torch.zeros(1), 1]},
        pair=(1, torch.ones(1)),
        other=object(),
        long=list(range(1000)),
        module=nn.Linear(1, 1),
    )


def spoil(item: Any) -> None:
    item.steps, item.name, item.rate, item.none = 4, "b", 0.7, "now"
    item.bank += 1
    item.averages["w"] += 1
    item.averages["new"] = 1
    item.averages["deep"].append(2)
    item.averages["deep"][0] = torch.full((1,), 7.0)
    item.pair = (2, torch.zeros(1))
    item.long.append(1)


def plain(item: Any) -> str:
    names = ("steps", "name", "rate", "none", "bank", "averages", "pair")
    return str({name: getattr(item, name) for name in names})


def test_they_go_back_by_value_into_the_same_objects() -> None:
    item = owner()
    before, same = (
        plain(item),
        (item.bank, item.averages, item.averages["w"], item.averages["deep"]),
    )
    snapshot = take({"attributes": Attributes({"x": item})})
    spoil(item)
    restore(snapshot, {"attributes": Attributes({"x": item})})
    assert plain(item) == before
    now = (item.bank, item.averages, item.averages["w"], item.averages["deep"])
    assert all(a is b for a, b in zip(now, same, strict=True))
    assert len(item.long) == 1001  # a record that only grows


def test_a_snapshot_does_not_change_with_them_and_goes_into_a_checkpoint() -> None:
    item = owner()
    before = plain(item)
    saved = take({"attributes": Attributes({"x": item})}).state_dict()
    spoil(item)
    loaded = Snapshot.from_state_dict(copy.deepcopy(saved))
    restore(loaded, {"attributes": Attributes({"x": item})})
    assert plain(item) == before
    spoil(item)
    restore(loaded, {"attributes": Attributes({"x": item})})
    assert plain(item) == before


def test_only_what_has_tensors_goes_back_where_counts_go_on() -> None:
    item = owner()
    snapshot = take({"attributes": Attributes({"x": item})})
    spoil(item)
    attributes = Attributes({"x": item})
    attributes.numbers = False
    restore(snapshot, {"attributes": attributes})
    assert item.steps == 4
    assert torch.equal(item.bank, torch.arange(3.0))
    assert torch.equal(item.averages["w"], torch.ones(2))


def drawn(item: Any) -> list[float]:
    return [
        float(torch.rand(1, generator=item.noise)),
        item.python[0].random(),
        float(item.numpy["rng"].random()),
        float(item.legacy.random()),
    ]


def test_generators_and_arrays_go_back_too() -> None:
    item: Any = SimpleNamespace(
        noise=torch.Generator().manual_seed(1),
        python=[random.Random(2)],
        numpy={"rng": np.random.default_rng(3)},
        legacy=np.random.RandomState(4),
        array=np.arange(3.0),
        objects=np.array([object()]),
        data=np.zeros(2**22),
    )
    array, generators = item.array, (item.noise, item.python[0], item.numpy["rng"], item.legacy)
    snapshot = take({"attributes": Attributes({"x": item})})
    first = drawn(item)
    item.array += 1
    item.data += 1
    restore(snapshot, {"attributes": Attributes({"x": item})})
    assert drawn(item) == first
    assert item.array is array
    assert array.tolist() == [0.0, 1.0, 2.0]
    now = (item.noise, item.python[0], item.numpy["rng"], item.legacy)
    assert all(a is b for a, b in zip(now, generators, strict=True))
    assert item.data[0] == 1  # too large for a state

    item.array = np.zeros(5)
    parts = Attributes({"x": item})
    parts.numbers = False
    restore(snapshot, {"attributes": parts})
    assert item.array.tolist() == [0.0, 1.0, 2.0]
    assert drawn(item) != first  # random numbers go on


def test_what_belongs_to_torch_is_left_alone() -> None:
    module = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    attributes = Attributes({"module": module, "optimizer": optimizer})
    state = attributes.state_dict()
    snapshot = take({"attributes": attributes})
    handle = module.register_forward_hook(lambda *_: None)
    optimizer.param_groups[0]["lr"] = 0.2
    module.running_mean += 1
    module.eval()
    restore(snapshot, {"attributes": attributes})
    assert "running_mean" not in state["module"]
    assert module._forward_hooks
    assert not module.training
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert module.running_mean is not None
    assert float(module.running_mean[0]) == 1
    handle.remove()
