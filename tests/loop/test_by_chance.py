"""What is rounded by chance: the same where a run was resumed, or replayed something in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_fp.fabric
from lightning_fp import FP8Precision, ParityProbe, PrecisionFallback, StagedRollout
from lightning_fp.demo.faults import fault_plugin, fault_run
from lightning_fp.loop import PrecisionLoop
from lightning_fp.recipes import RolloutRecipe, Stage
from tests.helper import (
    LanguageModel,
    TinyGPT,
    make_trainer,
    next_byte_loss,
    text_loader,
    text_rows,
)
from tests.two_ranks import run_on_two_ranks

FORMAT = "e8m3-stochastic"
STEPS = 8
SAVED = 3

Weights = dict[str, Tensor]


class Checkpointed(nn.Module):
    """A GPT with dropout, whose blocks are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gpt = TinyGPT(dropout=0.1)
        for block in self.gpt.blocks:
            block.forward = _again(block.forward)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)


def _again(forward: Any) -> Any:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def weights(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ in a loop of one's own


def own_loop(model: nn.Module, **options: Any) -> PrecisionLoop:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return PrecisionLoop(model, optimizer, FORMAT, base="32-true", layers={"*": FORMAT}, **options)


def train(
    make: Any, path: Path, *, compiled: bool = False, interrupted: bool = False, **options: Any
) -> Weights:
    """To the end; if interrupted, by way of a file into new objects."""
    torch.manual_seed(5)
    batches = text_rows(8 * STEPS).split(8)

    def loss_of(model: nn.Module) -> Any:
        loss = lambda batch: next_byte_loss(model, batch)  # noqa: E731
        return torch.compile(loss, backend="aot_eager") if compiled else loss

    model = make()
    loop = own_loop(model, **options)
    step = loss_of(model)
    for index, batch in enumerate(batches):
        if interrupted and index == SAVED:
            saved = {
                "model": model.state_dict(),
                "optimizer": loop.optimizer.state_dict(),
                "loop": loop.state_dict(),
            }
            torch.save(saved, path)
            loop.close()
            torch.manual_seed(77)  # another process
            model = make()
            loop = own_loop(model, **options)
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            loop.optimizer.load_state_dict(saved["optimizer"])
            loop.load_state_dict(saved["loop"])
            step = loss_of(model)
        torch.randn(3)  # what else draws in between is nothing to it
        loop.step(step, [batch[:4], batch[4:]])
    loop.close()
    return weights(model)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plain_loop_goes_on_bit_for_bit(compiled: bool, tmp_path: Path) -> None:
    make = TinyGPT if compiled else Checkpointed
    whole, resumed = (
        train(make, tmp_path / "saved.pt", compiled=compiled, interrupted=interrupted)
        for interrupted in (False, True)
    )
    assert same(whole, resumed)


def test_micro_batches_and_steps_are_rounded_each_in_its_own_way() -> None:
    """The first forwards of four micro-batches that are alike, on weights that stay."""
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = PrecisionLoop(model, optimizer, FORMAT, base="32-true", layers={"*": FORMAT})
    batch, losses = text_rows(4), []

    def compute(micro: Tensor) -> Tensor:
        loss = next_byte_loss(model, micro)
        losses.append(float(loss.detach()))
        return loss

    for _ in range(2):
        loop.step(compute, [batch, batch])
    loop.close()
    assert len(set(losses)) == len(losses) == 4


def test_replays_leave_a_plain_loop_as_it_would_be(tmp_path: Path) -> None:
    alone = train(Checkpointed, tmp_path / "saved.pt")
    watched = train(
        Checkpointed,
        tmp_path / "saved.pt",
        dirpath=tmp_path,
        fallback={"probe_every_n_steps": 2, "snapshot_every_n_steps": 2},
        parity={"every_n_steps": 3},
    )
    assert same(alone, watched)


# ------------------------------------------------------------------ in Fabric, by its plugin


def in_fabric(path: Path, *, interrupted: bool) -> Weights:
    torch.manual_seed(5)

    def parts() -> Any:
        plugin = lightning_fp.fabric.FP8Precision(FORMAT, base="32-true", layers={"*": FORMAT})
        fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
        model = Checkpointed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return fabric, plugin, *fabric.setup(model, optimizer)

    fabric, plugin, model, optimizer = parts()
    for index, batch in enumerate(text_rows(8 * STEPS).split(8)):
        if interrupted and index == SAVED:
            fabric.save(path, {"model": model, "optimizer": optimizer, "precision": plugin})
            torch.manual_seed(77)
            fabric, plugin, model, optimizer = parts()
            fabric.load(path, {"model": model, "optimizer": optimizer, "precision": plugin})
        fabric.backward(next_byte_loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_fabric_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    assert same(in_fabric(path, interrupted=False), in_fabric(path, interrupted=True))


# ------------------------------------------------------------------ in the Trainer


def fit(callbacks: list[L.Callback], directory: Path, **options: Any) -> Weights:
    torch.manual_seed(5)
    model = LanguageModel(Checkpointed())
    plugin = FP8Precision(FORMAT, base="32-true", layers={"*": FORMAT})
    ckpt = options.pop("ckpt_path", None)
    trainer = make_trainer(
        plugin,
        callbacks=callbacks,
        default_root_dir=directory,
        accumulate_grad_batches=2,
        **options,
    )
    trainer.fit(model, text_loader(8 * STEPS), ckpt_path=ckpt)
    return weights(model)


def test_the_trainer_goes_on_bit_for_bit_with_accumulation_and_dropout(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    whole = fit([Saves()], tmp_path, max_epochs=2)
    assert same(whole, fit([], tmp_path, max_epochs=2, ckpt_path=path))


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_stage_that_begins_where_a_run_is_resumed(step: int, tmp_path: Path) -> None:
    """Its first batch has come before the stage begins."""
    stages = (
        Stage(name="high", layers={"*": "high"}, until={"steps": 4}),
        Stage(name="by chance", layers={"*": "configured"}),
    )
    recipe = RolloutRecipe(name="two", stages=stages)
    path = tmp_path / "saved.ckpt"

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

    def fit_staged(*more: L.Callback, ckpt_path: Path | None = None) -> Weights:
        run = fault_run(
            None,
            fault_plugin(FORMAT),
            [StagedRollout(recipe, dirpath=tmp_path), *more],
            steps=STEPS,
            blocks=1,
            ckpt_path=ckpt_path,
        )
        return weights(run.model)

    whole = fit_staged(Saves())
    torch.manual_seed(77)
    assert same(whole, fit_staged(ckpt_path=path))


def test_replays_leave_a_trainer_as_it_would_be(tmp_path: Path) -> None:
    alone = fit([], tmp_path, max_epochs=1)
    watching: list[L.Callback] = [
        PrecisionFallback(dirpath=tmp_path, probe_every_n_steps=2, snapshot_every_n_steps=2),
        ParityProbe(every_n_steps=3, dirpath=tmp_path),
    ]
    assert same(alone, fit(watching, tmp_path, max_epochs=1))


# ------------------------------------------------------------------ over ranks


def test_two_ranks_go_on_bit_for_bit_and_round_each_in_its_own_way(tmp_path: Path) -> None:
    run_on_two_ranks("tests.loop.chance_ranks", tmp_path)
    whole, resumed, fields = (
        [torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1)]
        for name in ("whole", "resumed", "noise")
    )
    assert same(whole[0], whole[1])
    for rank in (0, 1):
        assert same(whole[rank], resumed[rank])
    # 31 bits each; of a million pairs the correlation's standard deviation is 0.001
    correlation = torch.corrcoef(torch.stack(fields).double())[0, 1]
    assert abs(correlation) < 4e-3
