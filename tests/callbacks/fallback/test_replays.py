"""What a replay runs, and that nothing of it is left: beside the same run without the fallback."""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from lightning_fp import FP8Precision, FP16Precision, PrecisionFallback
from lightning_fp.plugins import LayerPrecision
from lightning_fp.records.events import Demotion, Note, Verdict, read_events
from lightning_fp.stability.happenings import Asked
from lightning_fp.stability.questions import ProbeStep
from lightning_fp.stability.replay.trajectory import Trajectory, replay_trajectory
from lightning_fp.stability.supervise.supervisor import Supervisor
from tests.helper import make_trainer, supervisor_of

WIDTH = 8
STEPS = 20
ASKED = 14
"""Before this step the fallback is asked for a verdict."""


class Regression(L.LightningModule):
    """Two linear layers; keeps the hyper-parameters and the losses of its steps."""

    def __init__(self, optimizers: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 1)
        self.optimizers_of = optimizers
        self.seen: list[Any] = []

    def loss(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x).tanh()) - x.mean(dim=1, keepdim=True)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        names = ("lr", "betas", "momentum", "weight_decay")
        groups = optimizer.param_groups
        self.seen.append([float_of(g[name]) for g in groups for name in names if name in g])

    def configure_optimizers(self) -> Any:
        if self.optimizers_of is None:
            return AdamW(self.parameters(), lr=1e-2)
        return self.optimizers_of(self.parameters())


def float_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else float(value)


def rows(count: int = 4 * STEPS, batch_size: int = 4, **options: Any) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(0)
    data: Any = torch.randn(count, WIDTH, generator=generator)
    return DataLoader(data, batch_size=batch_size, **options)


class Asks(L.Callback):
    """Has the fallback look into a step, whatever its detector says; last in the list."""

    def __init__(self, fallback: PrecisionFallback, ask: Callable[[Supervisor], object]) -> None:
        self.fallback, self.ask = fallback, ask
        self.asked = SimpleNamespace(at=None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plugin: Any = trainer.precision_plugin
        plugin.on_input.append(self.arrived)

    def arrived(self, batch: Any) -> None:
        supervisor = supervisor_of(self.fallback)
        step = supervisor.count.done
        if step == ASKED and self.asked.at is None:
            self.asked.at = step
            self.ask(supervisor)


def investigate() -> Callable[[Supervisor], object]:
    def ask(supervisor: Supervisor) -> None:
        supervisor.tell(Asked(at=ASKED, onset=ASKED, risen=False))
        supervisor.hands.answer(ProbeStep(at=ASKED))

    return ask


def fallback_at(directory: Path, *, rehearse: bool = True) -> PrecisionFallback:
    return PrecisionFallback(
        dirpath=directory,
        probe_every_n_steps=None,
        limit=None,
        snapshot_every_n_steps=4,
        rehearse=rehearse,
    )


def fp8() -> LayerPrecision:
    return FP8Precision("dynamic", base="32-true", layers={"*": "fp8-dynamic"})


def train(
    model: L.LightningModule,
    callbacks: list[L.Callback] | None = None,
    plugin: LayerPrecision | None = None,
    loader: Any = None,
    **options: Any,
) -> Any:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(1)
    plugin = fp8() if plugin is None else plugin
    trainer = make_trainer(plugin, **{"max_epochs": 1, "callbacks": callbacks or [], **options})
    trainer.fit(model, rows() if loader is None else loader)
    return model


def watched(
    model: L.LightningModule,
    directory: Path,
    callbacks: list[L.Callback] | None = None,
    *,
    rehearse: bool = True,
    **options: Any,
) -> tuple[Any, PrecisionFallback]:
    """The run with an investigation in its middle, of which the verdict is not "precision"."""
    fallback = fallback_at(directory, rehearse=rehearse)
    asks = Asks(fallback, investigate())
    train(model, [*(callbacks or []), fallback, asks], **options)
    assert asks.asked.at == ASKED
    events = read_events(directory)
    verdicts = {event.verdict for event in events if isinstance(event, Verdict)}
    assert verdicts & {"not precision", "unclear"}
    assert not any(isinstance(event, Demotion) for event in events)
    notes = [event.reason for event in read_events(directory) if isinstance(event, Note)]
    assert not any("failed" in note for note in notes)
    assert fallback.steps.replayed > 4
    return model, fallback


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif not callable(one):
        assert one == other, path


def state_of(model: Any) -> dict[str, Any]:
    trainer = model.trainer
    return {
        "weights": dict(model.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "steps": trainer.global_step,
        "random": (random.getstate(), np.random.get_state()[1], torch.get_rng_state()),
        "logged": dict(trainer.callback_metrics),
        "seen": model.seen,
    }


# --- Optimizers and schedulers ------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    # milestones at the very step that is looked into
    "StepLR": lambda o: schedulers.StepLR(o, ASKED, 0.1),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [ASKED - 1, ASKED], 0.1),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, ASKED - 1),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=STEPS),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS, 2.0),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.1, ASKED),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)],
        milestones=[ASKED],
    ),
    "plateau": lambda o: {
        "scheduler": schedulers.ReduceLROnPlateau(o, patience=1),
        "monitor": "loss",
    },
}

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=1e-2),
    "tensor rate": lambda p: Adam(p, lr=torch.tensor(1e-2), foreach=False),
    "SGD": lambda p: SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "groups": lambda p: AdamW(
        [{"params": [each], "lr": 1e-2 / (1 + i)} for i, each in enumerate(p)]
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        *[("AdamW", name) for name in SCHEDULES if name != "CyclicLR"],
        ("SGD", "CyclicLR"),
        ("SGD", "OneCycleLR"),
        ("tensor rate", "StepLR"),
        ("tensor rate", "ExponentialLR"),
        ("groups", "CosineAnnealingLR"),
    ],
)
def test_rates_and_momenta_are_those_of_the_run_without_it(
    optimizer: str, schedule: str, tmp_path: Path
) -> None:
    def optimizers(parameters: Any) -> Any:
        made = OPTIMIZERS[optimizer](parameters)
        scheduler = SCHEDULES[schedule](made)
        config = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
        return [made], [{"interval": "step", **config}]

    plain = train(Regression(optimizers))
    model, _ = watched(Regression(optimizers), tmp_path)
    assert len({str(seen) for seen in plain.seen}) > 1 or schedule == "plateau"
    assert_same(state_of(model), state_of(plain))


# --- Modules and callbacks that change more than weights ----------------------------------------


class Warmup(Regression):
    """The rate by hand, in an override, as Lightning's documentation has it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (self.trainer.global_step + 1) / STEPS)
            group["betas"] = (0.9, 0.9 + 0.004 * self.trainer.global_step)
        optimizer.step(closure=closure)


class Counts(Regression):
    """Numbers, lists, tensors and generators of its own, in hooks from begin to end of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.history, self.bank = 0, [0.0], torch.zeros(4)
        self.recent = {"losses": [torch.zeros(())]}
        self.array = np.zeros(3)
        self.generators = [random.Random(0), np.random.default_rng(0)]
        self.noise = torch.Generator().manual_seed(3)
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.array += 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.bank[self.steps % 4] += batch.mean()
        noise = torch.randn(batch.shape, generator=self.noise) + torch.rand(())
        return batch + 0.1 * noise + 0.01 * (self.generators[0].random() + np.random.rand())

    def on_after_backward(self) -> None:
        self.history.append(float(self.body.weight.grad.norm()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        loss = loss + 0.01 * self.steps * self.bank.mean() * self.head.weight.mean()
        self.recent["losses"][0] += loss.detach()
        return loss + 0.1 * (self.teacher(batch) - self.body(batch)).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.body.weight, 0.1)
            self.head.weight.clamp_(-0.3, 0.3)


class Ema(L.Callback):
    """Averages of the weights, in a dict of a callback's own."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.updates = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.updates += 1
        for name, parameter in pl_module.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 / (1 + self.updates))


class Noise(L.Callback):
    """Writes into gradients and weights, by a schedule of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1
        for parameter in pl_module.parameters():
            parameter.grad.add_(1e-3 * torch.randn_like(parameter) * self.calls)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.head.weight.mul_(0.99)
        for group in trainer.optimizers[0].param_groups:
            group["weight_decay"] = 0.01 * self.calls


class Manual(Regression):
    """Two optimizers that step in turn on parameters toggled by Lightning, with schedulers."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch) / self.every)
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        if (batch_idx + 1) % self.every == 0:
            for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
                scheduler.step()
        return self.loss(batch).detach()

    def configure_optimizers(self) -> Any:
        both = [
            AdamW(self.body.parameters(), lr=1e-2),
            SGD(self.head.parameters(), lr=1e-2, momentum=0.9),
        ]
        return both, [
            schedulers.StepLR(both[0], ASKED, 0.1),
            schedulers.ExponentialLR(both[1], 0.9),
        ]


class Backbone(Regression):
    @property
    def backbone(self) -> nn.Module:
        return self.body

    def configure_optimizers(self) -> Any:
        return AdamW(self.head.parameters(), lr=1e-2)


CASES: dict[str, tuple[Callable[[], Any], Callable[[], list[Any]], dict[str, Any]]] = {
    "override of optimizer_step": (Warmup, list, {}),
    "attributes": (Counts, list, {}),
    "averages in a dict": (Counts, lambda: [Ema()], {}),
    "averages": (Regression, lambda: [WeightAveraging()], {}),
    "stochastic averages": (
        Regression,
        lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)],
        {"max_epochs": 4, "limit_train_batches": 5},
    ),
    "hooks that write": (Regression, lambda: [Noise()], {}),
    "epochs": (Counts, list, {"max_epochs": 4, "limit_train_batches": 5}),
    "clipping": (Counts, list, {"gradient_clip_val": 0.1}),
    "a partial window": (Counts, list, {"accumulate_grad_batches": 3, "max_epochs": 3}),
    "growing windows": (
        Counts,
        lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
        {"max_epochs": 3, "limit_train_batches": 10},
    ),
    "manual": (Manual, list, {}),
    "manual accumulation": (lambda: Manual(every=2), list, {"max_epochs": 2}),
    "unfreezing": (
        Backbone,
        lambda: [BackboneFinetuning(2, verbose=False)],
        {"max_epochs": 4, "limit_train_batches": 5},
    ),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Please also save or load the state:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_verdict_that_is_not_precision_leaves_the_run_as_it_was(
    case: str, tmp_path: Path
) -> None:
    make, callbacks, options = CASES[case]
    plain_callbacks, same_callbacks = callbacks(), callbacks()
    plain = train(make(), plain_callbacks, **options)
    model, fallback = watched(make(), tmp_path, same_callbacks, **options)
    assert_same(state_of(model), state_of(plain))
    names = ("steps", "history", "bank", "recent", "array")
    assert_same(*[{n: vars(m)[n] for n in names if n in vars(m)} for m in (model, plain)])
    for one, other in zip(same_callbacks, plain_callbacks, strict=True):
        assert_same(
            *[
                {n: v for n, v in vars(c).items() if n in ("average", "updates", "calls")}
                for c in (one, other)
            ]
        )
    assert fallback.steps.useful == fallback.steps.attempted == supervisor_of(fallback).count.done


# --- A trajectory is the run --------------------------------------------------------------------


class Jump(L.Callback):
    """Takes down what it finds when it begins: it must find the same when it begins again."""

    def __init__(self) -> None:
        self.right: float | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= ASKED - 3:
            (group,) = trainer.optimizers[0].param_groups
            self.right = group["lr"] if self.right is None else self.right
            group["lr"] = 2 * self.right


class Compiled(Regression):
    """A block that runs compiled, and eagerly in most replays."""

    def __init__(self) -> None:
        super().__init__()
        self.body.compile()


@pytest.mark.slow
def test_a_compiled_block_goes_on_as_without_it(tmp_path: Path) -> None:
    plain, (model, _) = train(Compiled()), watched(Compiled(), tmp_path)
    assert_same(state_of(model), state_of(plain))


class Plain(Counts):
    """Without generators of its own, which a snapshot does not have."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 0.1 * torch.randn_like(batch) + random.random() * np.random.rand()


TRAJECTORIES = {name: CASES[name] for name in ("override of optimizer_step", "averages", "manual")}
TRAJECTORIES |= {
    "attributes": (Plain, lambda: [Ema()], {"gradient_clip_val": 0.1}),
    "hooks that write": (Regression, lambda: [Noise()], {}),
    "state of a callback": (Regression, lambda: [Jump()], {}),
    "a partial window": (Plain, list, {"accumulate_grad_batches": 3, "max_epochs": 3}),
    "epochs": (Plain, list, {"max_epochs": 4, "limit_train_batches": 5}),
}


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_a_trajectory_in_the_runs_formats_is_the_run_bit_for_bit(case: str, tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def ask(supervisor: Supervisor) -> None:
        start = supervisor.snapshots.kept[-1]
        steps = supervisor.ring.since(start.step)
        assert steps
        run = supervisor.loop
        before = run.take()
        made: Trajectory = replay_trajectory(supervisor.loop, start, steps, {})
        assert made.end is not None
        found["losses"], found["recorded"] = made.losses, [step.loss for step in steps]
        found["now"] = copy.deepcopy(dict(supervisor.loop.model.state_dict()))
        run.restore(made.end)
        found["again"] = copy.deepcopy(dict(supervisor.loop.model.state_dict()))
        callbacks = [vars(c) for c in run.state.owners().values()]
        found["averages"] = [
            copy.deepcopy(v["_average_model"].state_dict())
            for v in callbacks
            if "_average_model" in v
        ]
        run.restore(before)
        found["averages now"] = [
            copy.deepcopy(v["_average_model"].state_dict())
            for v in callbacks
            if "_average_model" in v
        ]

    make, callbacks, options = TRAJECTORIES[case]
    fallback = fallback_at(tmp_path)
    train(make(), [*callbacks(), fallback, Asks(fallback, ask)], **options)
    assert len(found["losses"]) > 4
    assert found["losses"] == found["recorded"]
    assert_same(found["again"], found["now"])
    assert_same(found["averages"], found["averages now"])


class Writes(L.Callback):
    """Gives a layer another format in the middle of what is replayed."""

    def __init__(self, step: int, pattern: str, format: str) -> None:
        self.step, self.written = step, (pattern, format)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.precision_plugin.precision_map.set(*self.written)


@pytest.mark.parametrize(
    ("scaling", "callbacks"),
    [
        ("delayed", lambda: []),  # from the first steps on, which have no scales yet
        ("delayed", lambda: [Writes(8, "body", "fp8-dynamic")]),
        ("dynamic", lambda: [Writes(8, "*", "fp32"), Writes(11, "head", "fp8-delayed")]),
    ],
    ids=["delayed", "left", "came"],
)
def test_a_control_has_the_formats_and_scales_of_its_time(
    scaling: Any, callbacks: Callable[[], list[Any]], tmp_path: Path
) -> None:
    found: dict[str, Any] = {}

    def ask(supervisor: Supervisor) -> None:
        start = supervisor.snapshots.kept[-1]
        steps = supervisor.ring.since(start.step)
        assert steps
        table = supervisor.loop.table
        before = copy.deepcopy(table.scale_history.state_dict())
        formats = table.formats()
        made = replay_trajectory(supervisor.loop, start, steps, None)
        found["losses"], found["recorded"] = made.losses, [step.loss for step in steps]
        found["start"] = start.step
        assert_same(table.scale_history.state_dict(), before)
        assert table.formats() == formats

    fallback = fallback_at(tmp_path)
    plugin = FP8Precision(scaling, base="32-true", layers={"*": f"fp8-{scaling}"})
    model = train(Regression(), [*callbacks(), fallback, Asks(fallback, ask)], plugin)
    assert found["start"] < 8
    assert found["losses"] == found["recorded"]
    plain = FP8Precision(scaling, base="32-true", layers={"*": f"fp8-{scaling}"})
    assert_same(state_of(model), state_of(train(Regression(), callbacks(), plain)))


# --- The way of a batch -------------------------------------------------------------------------

CALLS: list[tuple[bool, str]] = []
"""Whether in a replay, and what is called."""


def told(name: str) -> Callable[..., None]:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = args[0] if isinstance(args[0] if args else None, L.Trainer) else self.trainer
        kind = "callback" if isinstance(self, L.Callback) else "module"
        CALLS.append((trainer.precision_plugin.precision_map.frozen, f"{kind}.{name}"))
        parent: Any = getattr(super(type(self), self), name)
        return parent(*args, **kwargs)

    return hook


OF_MODULE = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "optimizer_step",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "on_train_batch_end",
)
OF_CALLBACK = tuple(name for name in OF_MODULE if hasattr(L.Callback, name))
Told: Any = type("Told", (Regression,), {name: told(name) for name in OF_MODULE})
Hears: Any = type("Hears", (L.Callback,), {name: told(name) for name in OF_CALLBACK})


class Converts(FP8Precision):
    def convert_input(self, data: Any) -> Any:
        CALLS.append((self.precision_map.frozen, "plugin.convert_input"))
        return super().convert_input(data)


WAY = [
    "plugin.convert_input",
    "module.on_before_batch_transfer",
    "module.transfer_batch_to_device",
    "module.on_after_batch_transfer",
    "callback.on_train_batch_start",
    "module.on_train_batch_start",
    "module.optimizer_step",
    "module.training_step",
    "callback.on_before_zero_grad",
    "module.on_before_zero_grad",
    "module.optimizer_zero_grad",
    "callback.on_before_backward",
    "module.on_before_backward",
    "module.backward",
    "callback.on_after_backward",
    "module.on_after_backward",
    "callback.on_before_optimizer_step",
    "module.on_before_optimizer_step",
    "module.configure_gradient_clipping",
    "callback.on_train_batch_end",
    "module.on_train_batch_end",
]
"""A batch's way through Lightning: the same in all versions from 2.5.0 to 2.6.6."""


def test_a_replay_takes_the_batchs_whole_way(tmp_path: Path) -> None:
    CALLS.clear()
    plugin = Converts("dynamic", base="32-true", layers={"*": "fp8-dynamic"})
    watched(Told(), tmp_path, [Hears()], plugin=plugin, rehearse=False)
    made = [name for replay, name in CALLS if not replay]
    assert made == WAY * STEPS
    replayed = [name for replay, name in CALLS if replay]
    one_step = [n for n in WAY[: WAY.index("callback.on_before_optimizer_step")]]
    one_step.remove("module.optimizer_step")
    several = replayed.index("callback.on_before_optimizer_step")
    first = replayed[:several]
    assert first[: 3 * len(one_step)] == one_step * 3  # twice in FP8, once in high precision
    in_full = [name for name in replayed if name == "module.on_train_batch_end"]
    start = 3 * len(one_step)
    forward, looks = one_step[: one_step.index("callback.on_before_backward")], 0
    while replayed[start : start + len(forward)] == forward:  # in both, one batch after the other
        start, looks = start + len(forward), looks + 1
    assert looks >= 16
    assert looks % 2 == 0
    assert replayed[start : start + len(in_full) * len(WAY)] == WAY * len(in_full)
    assert len(in_full) >= 8


class Normalises(Regression):
    """Draws, moves and normalises where a GPU would do it, and does so once."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: Any = SimpleNamespace(run={}, replay={})

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 10 + 100

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch - 100) / 10 + 0.1 * torch.rand_like(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        replay = self.trainer.precision_plugin.precision_map.frozen  # type: ignore[union-attr]
        loop = self.trainer.fit_loop.epoch_loop
        key = (self.current_epoch, batch_idx)
        seen = (self.global_step, loop.batch_idx, loop.batch_progress.is_last_batch, batch.clone())
        (self.inputs.replay if replay else self.inputs.run).setdefault(key, []).append(seen)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replays_see_inputs_and_counters_of_their_time(accumulate: int, tmp_path: Path) -> None:
    options = {"max_epochs": 6, "limit_train_batches": 5, "accumulate_grad_batches": accumulate}
    model, _ = watched(Normalises(), tmp_path, **options)
    assert len(model.inputs.replay) >= 8
    for key, replays in model.inputs.replay.items():
        (made,) = model.inputs.run[key]
        for seen in replays:
            assert_same(seen, made, str(key))


def test_fp16_goes_to_bf16_with_its_inputs(tmp_path: Path) -> None:
    """Inputs are converted again, in the replay's precision."""
    dtypes: set[tuple[bool, torch.dtype]] = set()

    class Own(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            table = self.trainer.precision_plugin.precision_map  # type: ignore[union-attr]
            dtypes.add((table.frozen, batch.dtype))
            weight = 1e6 if 8 <= batch_idx < 17 else 1.0
            return (self.body(batch).tanh() * weight).float().square().mean() / weight**2

    fallback = PrecisionFallback(dirpath=tmp_path, probe_every_n_steps=None)
    model = train(Own(), [fallback], FP16Precision("16-true"), rows(), max_epochs=2)
    assert dtypes >= {(False, torch.float16), (True, torch.bfloat16), (False, torch.bfloat16)}
    notes = [event.reason for event in read_events(tmp_path) if isinstance(event, Note)]
    assert not any("failed" in note for note in notes)
    formats = model.trainer.precision_plugin.precision_map.formats()
    assert set(formats.values()) == {"bf16"}


# --- Batches and gradients ----------------------------------------------------------------------


@dataclasses.dataclass
class Example:
    x: Tensor
    name: str | None = None


class Moves:
    """An object that moves itself in place."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any, **_: Any) -> Moves:
        self.x = self.x.to(device)
        return self


class Holds:
    """An object that the module has to move."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


BATCHES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "BatchEncoding": (lambda x: BatchEncoding({"x": x}), lambda b: b["x"]),
    "dataclass": (Example, lambda b: b.x),
    "moves itself": (Moves, lambda b: b.x),
    "holds tensors": (Holds, lambda b: b.x),
    "nested": (lambda x: [{"a": (x, None, ["text"])}, 3], lambda b: b[0]["a"][0]),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_kind(kind: str, tmp_path: Path) -> None:
    pack, unpack = BATCHES[kind]

    class Packed(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = unpack(batch)
            x.mul_(0.5)  # a second time would change it again
            return super().training_step(x, batch_idx)

    def loader() -> Any:
        return rows(collate_fn=lambda items: pack(torch.stack(items)))

    plain = train(Packed(), loader=loader())
    model, _ = watched(Packed(), tmp_path, loader=loader())
    assert_same(state_of(model), state_of(plain))


class Sparse(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.embed = nn.Embedding(16, WIDTH, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch + self.embed((torch.arange(4) * 5 + batch_idx) % 16))
        dense, sparse = self.optimizers()  # type: ignore[misc]
        dense.zero_grad()
        sparse.zero_grad()
        self.manual_backward(loss)
        dense.step()
        sparse.step()
        return loss

    def configure_optimizers(self) -> Any:
        dense = [*self.body.parameters(), *self.head.parameters()]
        return [AdamW(dense, lr=1e-2), SparseAdam(self.embed.parameters(), lr=1e-2)]


class SparseWithSgd(Sparse):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch + self.embed((torch.arange(4) * 5 + batch_idx) % 16))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-2)


class Complex(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cfloat))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        spectrum = torch.fft.rfft(batch.float(), dim=1) * self.spectrum
        return super().training_step(batch + torch.fft.irfft(spectrum, n=WIDTH, dim=1), batch_idx)


@pytest.mark.parametrize("kind", [Sparse, SparseWithSgd, Complex])
def test_gradients_of_any_kind(kind: type[Regression], tmp_path: Path) -> None:
    plain = train(kind())
    model, _ = watched(kind(), tmp_path)
    assert_same(state_of(model), state_of(plain))


# --- Who hears of it ----------------------------------------------------------------------------


def test_what_writes_and_shows_hears_nothing(tmp_path: Path) -> None:
    heard: list[str] = []

    class Saver(ModelCheckpoint):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            heard.append(f"saver {trainer.global_step}")
            super().on_train_batch_end(trainer, *args)

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            assert trainer.checkpoint_callback is not None  # others may look for it
            trainer.save_checkpoint(tmp_path / "own.ckpt")
            heard.append(f"own {(tmp_path / 'own.ckpt').exists()}")
            (tmp_path / "own.ckpt").unlink(missing_ok=True)

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.precision_plugin.precision_map.frozen

    saver = Saver(tmp_path, every_n_train_steps=100)
    callbacks = [saver, Timer(), Saves(), Stops()]
    model, _ = watched(Regression(), tmp_path, callbacks, enable_checkpointing=True)
    assert [each for each in heard if "saver" in each] == [f"saver {i + 1}" for i in range(STEPS)]
    assert heard.count("own True") == STEPS
    assert heard.count("own False") >= 8  # in replays there is nothing to save
    assert model.trainer.global_step == STEPS


def test_hooks_that_write_formats_and_scales_have_done_so_in_their_time(tmp_path: Path) -> None:
    class Writes(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            table = trainer.precision_plugin.precision_map
            if trainer.global_step == 9:
                assert table.set("body", "fp8-delayed", reason="mine") == ["body"]
            if trainer.global_step == 12:
                table.set("body", "bf16", reason="mine")
            table.scale_history._scales.mul_(0.5)

    def plugin() -> LayerPrecision:
        return FP8Precision("delayed", base="32-true", layers={"*": "fp8-delayed"})

    plain = train(Regression(), [Writes()], plugin())
    model, _ = watched(Regression(), tmp_path, [Writes()], plugin=plugin())
    assert_same(state_of(model), state_of(plain))
    one, other = (m.trainer.precision_plugin.precision_map for m in (model, plain))
    assert one.formats() == other.formats()
    assert [change.after for change in one.changes] == [c.after for c in other.changes] == ["bf16"]
    assert_same(one.scale_history.state_dict(), other.scale_history.state_dict())


def test_an_epoch_that_a_hook_ends(tmp_path: Path) -> None:
    class Ends(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 5 else None

    plain = train(Ends(), max_epochs=4)
    model, _ = watched(Ends(), tmp_path, max_epochs=4)
    assert_same(state_of(model), state_of(plain))
    assert model.trainer.global_step == STEPS


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")
def test_a_step_that_takes_its_own_batches_is_watched_without_replays(tmp_path: Path) -> None:
    class Own(Regression):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, batch_idx, _ = next(dataloader_iter)
            return self.loss(batch * (torch.nan if batch_idx == 9 else 1))

    fallback = PrecisionFallback(dirpath=tmp_path, probe_every_n_steps=4)
    model = train(Own(), [fallback])
    assert fallback.steps.skipped == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    notes = [event.reason for event in read_events(tmp_path) if isinstance(event, Note)]
    assert any("nothing can be replayed" in note for note in notes)
    assert not any("failed" in note for note in notes)
    assert fallback.steps.replayed == 0


# --- Counts -------------------------------------------------------------------------------------


def test_with_two_optimizers_steps_are_batches(tmp_path: Path) -> None:
    taken: list[int] = []

    class Looks(L.Callback):
        def on_train_end(self, *_: Any) -> None:
            taken.extend(snapshot.step for snapshot in supervisor_of(fallback).snapshots.kept)

    fallback = fallback_at(tmp_path)
    asks = Asks(fallback, investigate())
    model = train(Manual(), [Looks(), fallback, asks])
    assert model.trainer.global_step == 2 * STEPS
    assert fallback.steps.attempted == fallback.steps.useful == STEPS
    assert supervisor_of(fallback).count.done == STEPS
    assert max(taken) == 16
    verdicts = [event for event in read_events(tmp_path) if isinstance(event, Verdict)]
    assert {verdict.step for verdict in verdicts} == {2 * ASKED}  # as in all records of a run
    assert read_events(tmp_path)[-1].step == 2 * STEPS


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "lightning_fp.fallback"):
        yield
