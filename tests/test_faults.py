"""The faults do what they are for: FP8 suffers and high precision does not, or both do."""

from __future__ import annotations

import math
from functools import cache

import lightning as L
import pytest
import torch

from lightning_fp.demo.faults import CASES, Fault, FaultRun, StuckScale, fault_plugin, fault_run
from tests.helper import same_weights

PRECISION = [name for name, case in CASES.items() if case.cause == "precision"]
OTHER = [name for name, case in CASES.items() if case.cause == "other"]
LASTING = ["learning-rate", "shuffled-labels"]
SEEDS = range(5)


@cache
def clean_run(seed: int) -> FaultRun:
    return fault_run(None, None, seed=seed)


@cache
def clean_start(scaling: str | None = None) -> FaultRun:
    return fault_run(None, None if scaling is None else fault_plugin(scaling), steps=12)


@pytest.mark.parametrize("name", PRECISION)
def test_high_precision_gives_the_same_bits_with_a_precision_fault(name: str) -> None:
    fault = CASES[name].make()
    assert isinstance(fault, Fault)
    fault.start = 2
    run = fault_run(fault, None, steps=12)
    assert run.losses == clean_start().losses
    assert same_weights(run.model, clean_start().model)  # nothing of the fault is left either


@pytest.mark.parametrize("name", PRECISION)
def test_a_precision_fault_acts_in_fp8_from_its_start(name: str) -> None:
    case = CASES[name]
    fault = case.make()
    assert isinstance(fault, Fault)
    fault.start, fault.seed = 6, 1
    if hasattr(fault, "ramp"):
        fault.ramp = 1
    faulty, healthy = (
        fault_run(fault, fault_plugin(case.scaling), steps=12),
        clean_start(case.scaling),
    )
    assert faulty.losses[:6] == healthy.losses[:6]
    assert faulty.losses[6:] != healthy.losses[6:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PRECISION)
def test_unprotected_fp8_ends_at_least_5_percent_worse(name: str, seed: int) -> None:
    case = CASES[name]
    run = fault_run(case.make(), fault_plugin(case.scaling), seed=seed)
    assert run.final_loss > 1.05 * clean_run(seed).final_loss


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scaling", ["fp8-delayed", "fp8-dynamic"])
def test_fp8_without_a_fault_ends_as_high_precision(scaling: str, seed: int) -> None:
    run = fault_run(None, fault_plugin(scaling), seed=seed)
    assert run.final_loss == pytest.approx(clean_run(seed).final_loss, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PRECISION)
def test_the_format_that_heals_a_fault_heals_it(name: str, seed: int) -> None:
    case = CASES[name]
    plugin = fault_plugin(case.scaling)
    heal = _WriteAt(150, case.layers, case.healed_by)
    run = fault_run(case.make(), plugin, [heal], seed=seed)
    assert run.final_loss == pytest.approx(clean_run(seed).final_loss, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER)
def test_other_faults_harm_high_precision_as_much(name: str) -> None:
    run = fault_run(CASES[name].make(), None)
    worst = max(loss if math.isfinite(loss) else math.inf for loss in run.losses[150:])
    assert worst > max(clean_run(0).losses[150:])
    if name in LASTING:
        assert run.final_loss > 1.05 * clean_run(0).final_loss


def test_a_fault_goes_on_from_a_checkpoint(tmp_path: object) -> None:
    def options(steps: int) -> dict[str, object]:
        return {"steps": 12, "max_steps": steps, "max_epochs": -1}

    def fault() -> StuckScale:
        return StuckScale("blocks.1.*", bits=6, start=4)

    whole = fault_run(fault(), fault_plugin(), **options(12))  # pyright: ignore
    path = f"{tmp_path}/half.ckpt"
    fault_run(fault(), fault_plugin(), [_SaveAt(7, path)], **options(7))  # pyright: ignore
    resumed = fault_run(fault(), fault_plugin(), ckpt_path=path, **options(12))  # pyright: ignore
    assert resumed.losses == whole.losses[7:]
    assert same_weights(resumed.model, whole.model)


def test_a_pattern_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        fault_run(StuckScale("nothing*"), None, steps=1)


class _SaveAt(L.Callback):
    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class _WriteAt(L.Callback):
    def __init__(self, step: int, pattern: str, format: str) -> None:
        self.step, self.pattern, self.format = step, pattern, format

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            table = trainer.precision_plugin.precision_map  # pyright: ignore
            table.set(self.pattern, self.format, reason="the test asks for it")


@pytest.mark.parametrize("name", [name for name in OTHER if name != "learning-rate"])
def test_other_faults_act_from_their_start_and_as_long_as_they_say(name: str) -> None:
    fault = CASES[name].make()
    fault.start = 3  # pyright: ignore
    brief = name.endswith("burst")
    if brief:
        setattr(fault, "steps" if name.startswith("learning") else "batches", 2)
    rates = _Rates()
    run = fault_run(fault, None, [rates], steps=8)
    clean = clean_start()
    if name.startswith("learning"):
        assert rates.seen[2] * 30 == pytest.approx(rates.seen[3], rel=0.5)
        assert run.losses[:4] == clean.losses[:4]
        assert run.losses[4:8] != clean.losses[4:8]
    elif name.startswith("nan"):
        assert [math.isnan(loss) for loss in run.losses] == [False] * 3 + [True] * 5
    else:
        assert run.losses[:3] == clean.losses[:3]
        assert run.losses[3] > clean.losses[3]


class _Rates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])
