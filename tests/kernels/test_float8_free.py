"""Emulation without float8 dtypes, as below sm89 and on MPS: the same bits, eagerly and compiled.

A CPU stands in for these devices. Nothing here is a card: what Triton and Metal make of integers is
their own, but they are given nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp import ClampMonitor, FP8Precision, convert
from lightning_fp.kernels import TorchaoMXKernel
from lightning_fp.layers import kernel_for, linear_format
from lightning_fp.layers.statistics_table import StatisticsTable
from lightning_fp.numerics import devices, statistics
from tests.helper import kept_bytes, make_trainer, saved_tensors, sqnr_db

FORMATS = [
    "fp8-delayed",
    "fp8-dynamic",
    "fp8-dynamic[grad_output=e4m3]",
    "fp8-dynamic[input=e4m3fnuz,weight=e4m3fnuz,grad_output=e5m2fnuz]",
    "fp8-dynamic[grad_weight=high]",
    "fp8-dynamic[power_of_two=true]",
    "fp8-rowwise",
    "fp8-rowwise-gw-hp",
    "fp8-block",
    "mxfp8",
]
FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}


class Without(TorchDispatchMode):
    """Refuses what a device does not have: dtypes, and operations."""

    def __init__(self, dtypes: set[torch.dtype], operations: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.dtypes, self.operations = dtypes, operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in self.operations
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            assert not (isinstance(each, Tensor) and each.dtype in self.dtypes), func
        return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 32))


def train(format: str, autocast: bool, *, compiled: Any = None, steps: int = 4) -> list[Tensor]:
    """Losses, input gradients and weights of some steps; the tokens are no multiple of anything."""
    model = network()
    table = convert(model, format, {"*": format}).precision_map
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = model if compiled is None else torch.compile(model, backend=compiled)
    told: list[Tensor] = []
    for step in range(steps):
        x = torch.randn(33, 48, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(x).float().square().mean() * 10.0**step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        table.step()
        assert x.grad is not None
        told += [loss.detach(), x.grad]
    return [*told, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("format", FORMATS)
def test_training_is_the_same_to_the_bit(
    format: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(format, autocast)
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
    with Without(FLOAT8):
        found = train(format, autocast)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_mode_sees_float8() -> None:
    """Or nothing above would fail."""
    with pytest.raises(AssertionError), Without(FLOAT8):
        train("fp8-dynamic", False)


def test_torchaos_mx_layer_gives_way_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(7, 64), torch.randn(32, 64)
    expected = TorchaoMXKernel()(x, w, None, "layer")
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
    with Without(FLOAT8):
        assert torch.equal(TorchaoMXKernel()(x, w, None, "layer"), expected)


def test_what_is_kept_for_backward_is_as_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte per element of the input, and nothing of the weight."""
    sizes = []
    for stands_in in (None, "sm80"):
        monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", stands_in)
        kernel = kernel_for(linear_format("fp8-dynamic"), "auto", cuda_fp8=False)
        x, w = torch.randn(512, 256), nn.Parameter(torch.randn(128, 256))
        with saved_tensors() as kept:
            kernel(x, w, None, "layer")
        sizes.append(kept_bytes(kept, iter([w])))
    assert sizes[0] == sizes[1]
    assert 512 * 256 <= sizes[1] < 512 * 256 + 64


@contextmanager
def graphs() -> Iterator[tuple[Any, list[torch.fx.GraphModule]]]:
    """A backend, and the graphs of forward and backward that it was given."""
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    yield aot_autograd(fw_compiler=keep, bw_compiler=keep), seen


def dtypes_of(graph: torch.fx.GraphModule) -> set[torch.dtype]:
    values = [node.meta.get("val") for node in graph.graph.nodes]
    return {value.dtype for value in values if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    "format",
    [f if f == "fp8-dynamic" else pytest.param(f, marks=pytest.mark.slow) for f in FORMATS],
)
def test_compiled_graphs_have_no_float8(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor would be given, forward and backward; the same losses as eager ones."""
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
    eager = train(format, False, steps=1)
    with graphs() as (backend, seen):
        compiled = train(format, False, compiled=backend, steps=1)
    assert len(seen) == 2
    assert not set.union(*map(dtypes_of, seen)) & FLOAT8
    for ours, theirs in zip(compiled, eager, strict=True):
        assert sqnr_db(theirs, ours) > 100
    if format == "fp8-dynamic":  # the graphs do show it where it is
        monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", None)
        with graphs() as (backend, seen):
            train(format, False, compiled=backend, steps=1)
        assert set.union(*map(dtypes_of, seen)) & FLOAT8


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_inductor_gives_the_same(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to eager emulation as compiled float8 is: sums in another order, no more."""
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
    eager = train(format, False, steps=1)
    torch._dynamo.reset()
    for ours, theirs in zip(train(format, False, compiled="inductor", steps=1), eager, strict=True):
        assert sqnr_db(theirs, ours) > 100


def as_on_mps(monkeypatch: pytest.MonkeyPatch) -> Without:
    """No float8, no float64, and no frexp (pytorch#194110)."""
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "mps")
    monkeypatch.setattr(statistics, "_reading_is_free", lambda x: False)
    return Without(FLOAT8 | {torch.float64}, ("aten::frexp.Tensor", "aten::frexp.Tensor_out"))


@pytest.mark.parametrize("format", [*FORMATS, "e4m3", "e8m3"])
def test_statistics_as_on_mps(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sampled steps, with all that can be asked; beside those of a CPU."""
    taken: list[Tensor] = []
    for like_mps in (False, True):
        model = network()
        with as_on_mps(monkeypatch) if like_mps else Without(set()):
            table = convert(model, format, {"*": format}).precision_map
            table.follow(True)
            collected = StatisticsTable(dict(table.layers), what_if=True)
            for step in range(3):
                collected.collect(True, step)
                model(torch.randn(33, 48)).square().mean().backward()
                collected.fold()
                collected.collect(False)
                table.step()
            taken.append(collected.take())
    assert [each.dtype for each in taken] == [torch.float64, torch.float32]
    torch.testing.assert_close(taken[1].double(), taken[0], rtol=2e-4, atol=1e-5)


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("scaling", ["delayed", "dynamic"])
def test_a_monitored_run_as_on_mps(
    scaling: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Only what stays on the host is in float64: rows of a log interval, losses."""
    model, refused = Regression(), as_on_mps(monkeypatch)
    monitor = ClampMonitor(every_n_steps=2, log_every_n_steps=4, dirpath=tmp_path, what_if=True)
    plugin = FP8Precision(scaling, base="32-true", layers={"*": f"fp8-{scaling}"})

    class Steps(L.Callback):
        """The mode stands around forward and backward."""

        def on_train_batch_start(self, *_: Any) -> None:
            refused.__enter__()

        def on_after_backward(self, *_: Any) -> None:
            refused.__exit__(None, None, None)

    trainer = make_trainer(plugin, callbacks=[monitor, Steps()], max_steps=8)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(16, 48), batch_size=2))
    assert monitor.latest is not None
    assert len(monitor.latest) == 2 * 4
    assert "failed" not in caplog.text
