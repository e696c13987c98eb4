"""Contract 4: a step reads nothing from the device. Here the CPU stands in for one.

Whatever would wait for a device is an error while a step runs: a value that is read, and a tensor
that is made of numbers of the host (its copy waits, too). What may be read where is said in
`ALLOWED`; all of it is free on the CPU, or one awaited scalar, or once per log interval.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback, convert
from lightning_fp.kernels.memory import (
    SLOTS,
    OperandRecord,
    _power,
    empty,
    fold_gradients,
    from_slots,
    in_slot,
)
from lightning_fp.layers.statistics_table import StatisticsTable
from lightning_fp.loop import PrecisionLoop
from lightning_fp.numerics import statistics
from lightning_fp.stepping.guard import Guard
from tests.helper import make_trainer

PACKAGE = "lightning_fp"
READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
READS |= {"unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor"}
METHODS = {"tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__"}
FROM_HOST = {"tensor", "as_tensor"}

ALLOWED = {
    # By contract: an optimizer that takes no device flag costs one awaited scalar.
    "stepping/guard.py",
    # On CUDA they read what was copied asynchronously, a step late.
    "stability/detect/signals.py",
    "stepping/late_flags.py",
}


class Watch:
    """Counts the package's reads, by file and line, while it is on."""

    def __init__(self, allowed: set[str]) -> None:
        self.on, self.allowed = False, allowed
        self.found: Counter[str] = Counter()

    def see(self, what: str) -> None:
        if not self.on:
            return
        frames = traceback.extract_stack()
        ours = [frame for frame in frames if f"/{PACKAGE}/" in frame.filename]
        below = frames[frames.index(ours[-1]) + 1 :] if ours else []
        if not ours or any("/torch/optim/" in frame.filename for frame in below):
            return  # torch's optimizers count their steps on the host
        place = Path(ours[-1].filename.split(f"/{PACKAGE}/")[-1])
        if str(place) not in self.allowed:
            self.found[f"{place}:{ours[-1].lineno} {what}"] += 1


class Dispatched(TorchDispatchMode):
    """Sees operations, those of backward and of autograd's own code included."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).removeprefix("aten.").removesuffix(".default") in READS:
            self.watch.see(func._schema.name)
        if func._schema.name in ("aten::index", "aten::index_put_"):
            for index in args[1]:  # how many a mask picks has to be known first
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.watch.see("a mask as an index")
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Sees calls; `tolist` and `torch.tensor` dispatch nothing on a CPU."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS or name in FROM_HOST:
            self.watch.see(name)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Remembers what was done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(allowed: set[str] = ALLOWED) -> Iterator[Watch]:
    watch = Watch(allowed)
    with Dispatched(watch), Called(watch):
        yield watch


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one place where the package reads because it is free: on the CPU, in sampled steps."""
    monkeypatch.setattr(statistics, "_reading_is_free", lambda x: False)


class Sometimes(L.LightningModule):
    """Layers that run always, in every other batch, and never; one optimizer or two."""

    def __init__(self, optimizers: int = 1, make: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.make = make
        self.always, self.other, self.never = (nn.Linear(16, 16) for _ in range(3))
        self.count = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if not self.automatic_optimization:
            for layer, optimizer in zip((self.always, self.other), self.optimizers(), strict=True):
                loss = layer(batch).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss
        hidden = self.other(batch) if index % 2 else batch
        return (self.always(hidden) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        layers = (self.always, self.other) if self.count == 2 else (self,)
        made = [self.make(layer.parameters(), lr=0.01) for layer in layers]
        return made if self.count == 2 else made[0]


class FromStep(L.Callback):
    """Watches every step but those at which scales are first looked for."""

    def __init__(self, watch: Watch, first: int, last: int) -> None:
        self.watch, self.first, self.last = watch, first, last

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.watch.on = self.first <= trainer.global_step < self.last

    def on_train_end(self, *_: Any) -> None:
        self.watch.on = False


def train(watch: Watch, plugin: FP8Precision, callbacks: list[L.Callback], **options: Any) -> None:
    model = Sometimes(options.pop("optimizers", 1), options.pop("make", torch.optim.SGD))
    # While a layer has not run its scales are looked for, after steps 0, 2, 6, 14, 30, ...
    per_batch = model.count
    callbacks = [FromStep(watch, 16 * per_batch, 30 * per_batch), *callbacks]
    options = {"max_steps": 30 * per_batch, "log_every_n_steps": 1000, **options}
    loader = torch.utils.data.DataLoader(torch.randn(256, 16), batch_size=2)
    make_trainer(plugin, callbacks=callbacks, **options).fit(model, loader)


Callbacks = Callable[[Path], list[L.Callback]]

CALLBACKS: dict[str, Callbacks] = {
    "plugin": lambda _: [],  # with its guard
    "fallback": lambda path: [PrecisionFallback(dirpath=path, probe_every_n_steps=None)],
}


@pytest.mark.parametrize("callbacks", CALLBACKS)
@pytest.mark.parametrize(
    ("scaling", "options"),
    [
        ("dynamic", {}),
        ("delayed", {}),
        ("delayed", {"accumulate_grad_batches": 2}),
        ("delayed", {"optimizers": 2}),
    ],
    ids=str,
)
def test_a_step_reads_nothing(
    tmp_path: Path, scaling: str, options: dict[str, Any], callbacks: str
) -> None:
    plugin = FP8Precision(scaling, base="32-true", layers={"*": f"fp8-{scaling}"})
    with watched() as watch:
        train(watch, plugin, CALLBACKS[callbacks](tmp_path), **options)
    assert not watch.found


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_fused_optimizer_reads_nothing(
    optimizers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what the guard finds as a flag, of which the host hears a batch late."""
    monkeypatch.setattr(Guard, "_takes_flag", staticmethod(lambda *_: True))
    make = partial(torch.optim.AdamW, fused=True)
    plugin = FP8Precision("delayed", base="32-true", layers={"*": "fp8-delayed"})
    with watched(ALLOWED - {"stepping/guard.py"}) as watch:
        train(watch, plugin, CALLBACKS["fallback"](tmp_path), make=make, optimizers=optimizers)
    assert not watch.found


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_a_step_of_a_plain_loop_reads_nothing(scaling: str, tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = PrecisionLoop(
        model,
        optimizer,
        scaling,
        base="32-true",
        layers={"*": f"fp8-{scaling}"},
        fallback={"probe_every_n_steps": None},
        monitor=False,
        dirpath=tmp_path,
    )

    def loss(batch: tuple[Tensor, bool]) -> Tensor:
        hidden = model[1](batch[0]) if batch[1] else batch[0]
        return (model[0](hidden) - batch[0]).square().mean()

    with watched() as watch:
        for step in range(30):
            watch.on = step >= 16
            loop.step(loss, (torch.randn(2, 16), step % 2 == 0))
        watch.on = False
    assert not watch.found


@pytest.mark.parametrize(
    "format", ["fp8-delayed", "fp8-dynamic", "fp8-rowwise", "fp8-block", "mxfp8"]
)
def test_a_sampled_step_reads_nothing(format: str) -> None:
    """What ClampMonitor collects in a step; its log interval reads, by contract."""
    layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
    table = convert(layers, format, layers={"*": format}).precision_map
    collected = StatisticsTable(table.layers, what_if=True)
    table.follow(True)
    x = torch.randn(4, 128)
    with watched() as watch:
        for step in range(8):
            watch.on = step in (3, 4, 5)  # scales are looked for after 2 and 6
            collected.collect(True, step)
            layers[2](layers[0](x)).square().mean().backward()
            collected.fold()
            collected.collect(False)
            table.step()
        watch.on = False
        assert float(collected.take().sum()) > 0
    assert not watch.found


def test_a_monitor_reads_at_its_log_interval_alone(tmp_path: Path) -> None:
    monitor = ClampMonitor(every_n_steps=2, log_every_n_steps=1000, dirpath=tmp_path)
    plugin = FP8Precision("delayed", base="32-true", layers={"*": "fp8-delayed"})
    with watched() as watch:
        train(watch, plugin, [monitor])
    # Which layers collect is noted by numbers of the host that stay there; losses of many steps are
    # read together.
    places = {place.partition(":")[0] for place in watch.found}
    assert places <= {"telemetry/casts/sampling.py", "telemetry/step_curve.py"}
    assert watch.found.total() <= 2 * 14


def test_the_watch_sees_what_waits() -> None:
    """Or nothing above would fail."""
    with watched() as watch:
        watch.on = True
        convert(nn.Sequential(nn.Linear(16, 16)), "fp8-delayed", layers={"*": "fp8-delayed"})
        watch.on = False
    assert any("scale_history.py" in place for place in watch.found)


def test_the_record_of_a_step_stays_where_it_is_on_cuda() -> None:
    """A CUDA graph's replays write to where the gradient was at capture."""
    with FakeTensorMode():  # without autograd, which a CPU build does not have for CUDA
        gradient = torch.ones(SLOTS, 2, dtype=torch.float64, device="cuda")
        leaves: list[Any] = [SimpleNamespace(grad=gradient), SimpleNamespace(grad=None)]
        with Operations() as done:
            empty(leaves)
        assert [leaf.grad for leaf in leaves] == [gradient, None]
        assert "aten::_foreach_zero_" in done.names


def test_the_record_of_layers_that_did_not_run_is_nothing() -> None:
    records = [OperandRecord(2, 2, torch.device("cpu")) for _ in range(3)]
    into = torch.zeros(3, 2, dtype=torch.float64)
    records[1].grad_leaf.grad = in_slot(torch.tensor([3.0, 5.0]), 4)
    fold_gradients(records, into)
    assert into.tolist() == [[0, 0], [3, 5], [0, 0]]
    assert all(record.grad_leaf.grad is None for record in records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_record_comes_back_from_its_slot_in_any_dtype(dtype: torch.dtype) -> None:
    """In float32, as on MPS, with a power that it holds."""
    for amax in (1e-9, 3.0, 1e9):
        row = torch.tensor([amax, 5.0], dtype=dtype)
        powers = torch.stack([row[0] ** _power(dtype), row[1]])
        gradient = torch.zeros(SLOTS, 2, dtype=dtype)
        gradient[4] = powers
        found = from_slots(gradient)
        assert found.dtype is dtype
        torch.testing.assert_close(found, row, rtol=1e-6, atol=0)
