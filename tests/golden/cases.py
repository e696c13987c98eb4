"""The runs that traces are made of: every fault, and every way in which a run is made.

Only public names are used here, so that the same file makes the traces of an earlier revision and
of a later one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_fp import (
    ClampMonitor,
    FallbackPolicy,
    FP8Precision,
    FP16Precision,
    Gate,
    LossScaling,
    PrecisionFallback,
    RolloutRecipe,
    Stage,
    StagedRollout,
)
from lightning_fp.demo.faults import (
    CASES,
    ForwardCorruption,
    StuckScale,
    fault_plugin,
    fault_run,
)
from tests.golden.traces import Ending, Recorder, trace
from tests.helper import LanguageModel, fit, make_trainer, text_loader
from tests.two_ranks import run_on_two_ranks

Trace = dict[str, Any]

START = 150
"""Step at which a fault begins: detector and probe have learned by then what is usual."""

AFTERMATH = 30
"""Steps that follow: enough for the verdict, and for what is done about it."""

LATER = {
    "outliers": 60,
    "outlier-tokens": 66,
    "forward-drift": 130,
    "forward-clamp": 66,
    "backward-zero": 66,
    "backward-drift": 66,
    "learning-rate": 66,
    "learning-rate-burst": 40,
}
"""Of faults that are seen later."""

TWO_SEEDS = ("gradient-overflow", "forward-noise", "stuck-scale")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of which there is a trace."""

    run: Callable[[Path], Trace]
    """Makes it in an empty directory."""

    quick: bool = False
    """Whether it is tried by every `make test`, not only by `make proof`."""


def run_case(name: str) -> Trace:
    """The trace of a case, with one thread: sums depend on how many share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)  # all generators: recorded batches keep their states
    try:
        with tempfile.TemporaryDirectory() as directory:
            return json.loads(json.dumps(GOLDEN[name].run(Path(directory))))
    finally:
        torch.set_num_threads(threads)


def _between(callbacks: Sequence[L.Callback]) -> tuple[Recorder, Ending, list[L.Callback]]:
    first, last = Recorder(), Ending(list(callbacks))
    return first, last, [first, *callbacks, last]


# --- Faults -------------------------------------------------------------------------------------


def fault_trace(name: str, seed: int, directory: Path) -> Trace:
    """A fault of the demo, with the fallback."""
    known = CASES[name]
    fault: Any = known.make()
    fault.start = START
    steps = START + LATER.get(name, AFTERMATH)
    first, last, callbacks = _between([PrecisionFallback(dirpath=directory)])
    fault_run(fault, fault_plugin(known.scaling), callbacks, seed=seed, steps=steps)
    return trace(directory, (first, last))


def healthy_trace(directory: Path) -> Trace:
    """Nothing goes wrong, and everything watches."""
    watching = [
        ClampMonitor(every_n_steps=4, dirpath=directory),
        PrecisionFallback(dirpath=directory, every_n_steps=16, probe_every_n_steps=16),
    ]
    first, last, callbacks = _between(watching)
    fault_run(None, fault_plugin(), callbacks, steps=96, log_every_n_steps=4)
    return trace(directory, (first, last))


# --- Manual optimization ------------------------------------------------------------------------


class Adversaries(L.LightningModule):
    """Generator and discriminator with an optimizer each; one gradient is NaN, one scale sticks."""

    NAN_AT = 40

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.discriminator = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        of_generator, of_discriminator = self.optimizers()
        noise, real = batch[:, :16], batch[:, 16:]
        loss = self._score(real) - self._score(self(noise).detach())
        self._step(of_discriminator, loss)
        loss = self._score(self(noise))
        self._step(of_generator, loss * float("nan") if index == self.NAN_AT else loss)
        return loss

    def _score(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(self.discriminator(x)).mean()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        halves = (self.generator, self.discriminator)
        return [torch.optim.AdamW(half.parameters(), lr=1e-3) for half in halves]


def gan_trace(directory: Path) -> Trace:
    """Two optimizers, two steps per batch."""
    watching = [
        ClampMonitor(every_n_steps=8, dirpath=directory),
        PrecisionFallback(dirpath=directory, every_n_steps=16, snapshot_every_n_steps=8),
    ]
    first, last, callbacks = _between(watching)
    rows = torch.rand(120, 8, 48) - 0.5
    fault = StuckScale("discriminator.0", bits=8, start=100)
    plugin = FP8Precision("delayed", base="32-true", layers={"*": "fp8-delayed"})
    trainer = make_trainer(plugin, max_epochs=1, callbacks=[fault, *callbacks])
    trainer.fit(Adversaries(), torch.utils.data.DataLoader(rows, batch_size=None))
    return trace(directory, (first, last))


# --- FP16 ---------------------------------------------------------------------------------------


class TooLarge(LanguageModel):
    """For some steps the loss is beyond FP16 and well within bf16."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * 1e6 if 6 <= self.trainer.global_step < 15 else loss


def fp16_trace(directory: Path) -> Trace:
    """To bf16 at an overflow, and back."""
    policy = FallbackPolicy(hold=8)
    fallback = PrecisionFallback(policy=policy, probe_every_n_steps=None, dirpath=directory)
    first, last, callbacks = _between([fallback])
    scaling = LossScaling(init_scale=8, min_scale=4, hysteresis=1, growth_interval=4)
    plugin = FP16Precision(loss_scaling=scaling)
    fit(plugin, TooLarge(), loader=text_loader(), max_steps=32, callbacks=callbacks)
    return trace(directory, (first, last))


# --- Resume -------------------------------------------------------------------------------------

SAVED_AT = 100
WHOLE = 140

RECIPE = RolloutRecipe(
    name="golden",
    stages=(
        Stage(name="high", layers={"*": "high"}, until={"steps": 16}),
        Stage(
            name="most",
            layers={"head": "high", "*": "configured"},
            until={"steps": 80},
            gates=(Gate(statistic="clamped_mass/max", below=0.5, window=4),),
        ),
        Stage(name="all", layers={"*": "configured"}),
    ),
)


class SaveAt(L.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resume_trace(directory: Path) -> Trace:
    """A rollout under a fault, interrupted at a checkpoint and continued in the same directory."""
    fits: list[tuple[Recorder, Ending]] = []
    checkpoint = directory / "half.ckpt"
    for steps, path in ((SAVED_AT + 8, None), (WHOLE, checkpoint)):
        watching = [
            StagedRollout(RECIPE, dirpath=directory),
            ClampMonitor(every_n_steps=4, dirpath=directory),
            PrecisionFallback(dirpath=directory, every_n_steps=16),
        ]
        first, last, callbacks = _between(watching)
        fits.append((first, last))
        fault = StuckScale("blocks.1.*", bits=8, start=SAVED_AT - 10)
        options: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "ckpt_path": path}
        options["log_every_n_steps"] = 4
        saving = SaveAt(SAVED_AT, checkpoint) if path is None else L.Callback()
        fault_run(fault, fault_plugin(), [*callbacks, saving], steps=WHOLE, **options)
    return trace(directory, *fits)


# --- Two ranks ----------------------------------------------------------------------------------


class OnOneRank(ForwardCorruption):
    """A fault of the last rank; the others have its clock and nothing else."""

    rank = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.rank = trainer.global_rank

    def active(self, layer: nn.Module) -> bool:
        return self.rank == 1 and super().active(layer)


def rank_trace(directory: Path, rank: int) -> Trace:
    """Of one rank; both read the records that the first one writes."""
    fallback = PrecisionFallback(dirpath=directory)
    first, last, callbacks = _between([fallback])
    # Under DDP the clock ticks twice per step: the wrapper calls the module, and the step does.
    fault = OnOneRank("head", kind="noise", strength=1.0, start=2 * 75)
    fault_run(
        fault,
        fault_plugin("fp8-dynamic"),
        callbacks,
        seed=rank,
        steps=100,
        blocks=1,
        devices=2,
        strategy=DDPStrategy(),
        use_distributed_sampler=False,
    )
    return trace(directory, (first, last))


def two_ranks_trace(directory: Path) -> Trace:
    """DDP over gloo, the fault on one rank: both do the same."""
    run_on_two_ranks("tests.golden.ranks", directory, timeout=1200)
    told = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]
    for name in ("formats", "steps", "weights", "optimizers"):
        if told[0][name] != told[1][name]:
            raise ValueError(f"{name} differ over ranks: {told[0][name]} and {told[1][name]}")
    return told[0]


# --- All of them --------------------------------------------------------------------------------


def _of_fault(name: str, seed: int) -> Case:
    return Case(run=lambda directory: fault_trace(name, seed, directory))


GOLDEN: dict[str, Case] = {
    **{name: _of_fault(name, 0) for name in CASES},
    **{f"{name}-seed-1": _of_fault(name, 1) for name in TWO_SEEDS},
    "healthy": Case(run=healthy_trace),
    "gan": Case(run=gan_trace, quick=True),
    "fp16": Case(run=fp16_trace, quick=True),
    "resume": Case(run=resume_trace),
    "two-ranks": Case(run=two_ranks_trace),
}
"""By name, which is that of the file with its trace."""
