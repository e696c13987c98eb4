"""Whole training steps on fake cards; collected by `run.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp import PrecisionMap, convert, numerics
from lightning_fp.format_names import TABLE
from lightning_fp.layers.histories.scale_history import ScaleHistory
from lightning_fp.layers.statistics_table import StatisticsTable, observable
from tests.experts import GroupedExperts
from tests.kernels.cuda_rules import on_hardware

CARD, OTHER = torch.device("card:0"), torch.device("card:1")
FORMATS = [row.name for row in TABLE if row.scaling != "none" and row.name != "nvfp4"]
TOKENS = 1, 7, 24, 33
SLOW = pytest.mark.slow


FROM_HOST = torch.tensor


def from_host(values: Any, *, device: torch.device | None = None, **options: Any) -> Tensor:
    """`torch.tensor`, which knows nothing of fake devices."""
    here = FROM_HOST(values, **options)
    return here if device is None else torch.empty(here.shape, dtype=here.dtype, device=device)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is fake, on cards and on the host.

    Where layers change their formats it is read which of them have scales: left out here.
    """
    monkeypatch.setattr(ScaleHistory, "_warm_up", lambda _: None)
    monkeypatch.setattr(ScaleHistory, "_cool_down", lambda _: None)
    monkeypatch.setattr(numerics.statistics, "_reading_is_free", lambda _: False)
    monkeypatch.setattr(torch, "tensor", from_host)
    # The engine would want a thread for each device, and knows of one card.
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        yield


def converted(format: str, depth: int = 4) -> tuple[nn.Sequential, PrecisionMap]:
    """A model on the host with its table, as it is when all layers have scales."""
    modules = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 64)
    model = nn.Sequential(*modules[:depth])
    table = convert(model, format, layers={"*": format}).precision_map
    for layer in layers(table) if format == "fp8-delayed" else ():
        layer.switch(layer.format, dataclasses.replace(layer.kernel, cold=False))
    return model, table


def put(module: nn.Module, device: torch.device) -> None:
    """`module.to(device)`, which torch cannot do to fake Parameters."""
    for layer in module.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device=device)))


def layers(table: PrecisionMap) -> list[Any]:
    return list(table.layers.values())


QUICK = [("fp8-delayed", True)]
CELLS = [
    (format, hardware)
    for format in FORMATS
    for hardware in (False, True)
    if (format, hardware) != ("fp8-block", True)  # of whole blocks of 128: test_block.py
]


def slowly(cases: list[Any], quick: list[Any]) -> list[Any]:
    """The cases, all but a few of them marked slow."""
    return [case if case in quick else pytest.param(*_each(case), marks=SLOW) for case in cases]


def _each(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


@pytest.mark.parametrize("format", ["fp8-rowwise", "fp8-dynamic"])
def test_whole_steps_of_experts(format: str) -> None:
    """Forward, backward, statistics; nothing is read, whoever has how many tokens."""
    model = nn.ModuleDict({"experts": GroupedExperts(), "out": nn.Linear(32, 32)})
    table = convert(model, format, layers={"experts": format}).precision_map
    put(model, CARD)
    statistics = StatisticsTable(observable({"experts": table.layers["experts"]}))
    statistics.collect(format == "fp8-rowwise")  # per tensor, it is read whose tokens are where
    x = torch.randn(33, 32, device=CARD, requires_grad=True)
    output = model["experts"](x, torch.ones(4, dtype=torch.int64, device=CARD))
    assert (output.shape, output.device) == ((33, 32), CARD)
    output.square().mean().backward()
    statistics.fold()
    for tensor in (x, *model["experts"].parameters()):
        assert tensor.grad is not None
        assert (tensor.grad.shape, tensor.grad.device) == (tensor.shape, CARD)


@pytest.mark.parametrize(("format", "hardware"), slowly(CELLS, QUICK))
def test_whole_steps(format: str, hardware: bool) -> None:
    """Forward, backward, optimizer, statistics, scales; any number of tokens; nothing is read."""
    model, table = converted(format, 1)
    put(model, CARD)
    layer: Any = table.layers["0"]
    if hardware:
        layer.switch(layer.format, on_hardware(layer.kernel))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    statistics = StatisticsTable(table.layers)
    for tokens in TOKENS:
        statistics.collect(tokens == 7)
        x = torch.randn(tokens, 64, device=CARD, requires_grad=True)
        output = model(x)
        assert (output.shape, output.device) == ((tokens, 96), CARD)
        output.square().mean().backward()
        statistics.fold()
        for tensor in (x, *model.parameters()):
            assert tensor.grad is not None
            assert (tensor.grad.shape, tensor.grad.device) == (tensor.shape, CARD)
        optimizer.step()
        optimizer.zero_grad()
        table.step()
    assert statistics.take().device == CARD


def test_what_reads_a_value_raises() -> None:
    """Or the steps above would show nothing of it; so does what mixes devices."""
    x = torch.randn(3, 3, device=CARD)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(RuntimeError, match="two devices, card:0 and card:1"):
        x @ x.to(OTHER)


class Moves(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.device != args[0].device:
            self.count += 1
        return made


@pytest.mark.parametrize(
    "format", slowly(["fp8-delayed", "fp8-dynamic", "fp8-rowwise", "mxfp8"], ["fp8-delayed"])
)
def test_a_model_over_two_cards_and_the_host(format: str) -> None:
    """Scales and records are where each layer is, and rows are sampled alike."""
    model, table = converted(format)
    table.follow(True)
    places = {"0": CARD, "2": OTHER, "3": torch.device("cpu")}
    for name, place in places.items():
        put(model.get_submodule(name), place)
    statistics = StatisticsTable(table.layers)
    offsets: list[Tensor] = []
    for turn in range(2):
        statistics.collect(True, turn)
        hidden = model[1](model[0](torch.randn(7, 64, device=CARD))).to(OTHER)
        model[3](model[2](hidden).cpu()).square().mean().backward()
        statistics.fold()
        statistics.collect(False)
        table.step()
        offsets += [layer.statistics.sampling.offset for layer in layers(table)]
    for name, place in places.items():
        layer: Any = table.layers[name]
        assert layer.statistics.recorded.device == layer.statistics.grad_leaf.device == place
        memory = layer.memory
        assert (memory is None) is (format in ("fp8-rowwise", "mxfp8"))
        assert memory is None or memory.scales.device == memory.recorded.device == place
    assert statistics.take().device == CARD
    assert [each.device for each in offsets] == 2 * list(places.values())
    assert len(set(map(id, offsets))) == 6


class Offloaded:
    """Weights that are on the host between steps, as FSDP2's CPUOffloadPolicy has them.

    Around a layer's forward it finds a whole one on the card in their place.
    """

    def __init__(self, layer: Any) -> None:
        self.kept = dict(layer._parameters)
        self.lent = {
            name: nn.Parameter(torch.empty(each.shape, device=CARD))
            for name, each in self.kept.items()
        }
        layer.register_forward_pre_hook(lambda layer, _: layer._parameters.update(self.lent))
        layer.register_forward_hook(lambda layer, *_: layer._parameters.update(self.kept))


@pytest.mark.parametrize(
    ("format", "change"),
    slowly(
        [
            (format, change)
            for format in ("fp8-delayed", "fp8-dynamic", "fp8-block")
            for change in (False, True)
        ],
        [("fp8-delayed", True)],
    ),
)
def test_cpu_offload(format: str, change: bool) -> None:
    """Scales and records are on the card, where layers compute, and stay there."""
    model, table = converted(format)
    table.follow(True)
    lent = [Offloaded(layer).lent["weight"] for layer in layers(table)]
    statistics = StatisticsTable(table.layers)

    def step() -> None:
        statistics.collect(True)
        model(torch.randn(7, 64, device=CARD)).square().mean().backward()
        statistics.fold()
        statistics.collect(False)
        table.step()

    step()
    if change:
        table.set("0", "bf16")
        table.apply()
    with Moves() as moves:
        step()
    assert moves.count == 0
    for layer, weight in zip(layers(table), lent, strict=True):
        assert layer.weight.device.type == "cpu"
        assert weight.grad is not None
        assert weight.grad.device == CARD
        memory = layer.memory
        assert memory is None or memory.scales.device == memory.recorded.device == CARD
    assert statistics.take().device == CARD
