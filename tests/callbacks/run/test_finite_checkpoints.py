"""A checkpoint whose weights are not finite is not written over a good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.records import read_events
from tests.callbacks.fallback.test_rehearsal import Net, rows
from tests.helper import make_trainer

BAD = 6
"""After so many steps a weight is NaN, until step 10."""


class Breaks(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            if trainer.global_step == BAD:
                self.kept = pl_module.head.weight.clone()
                pl_module.head.weight.view(-1)[0] = float("nan")
            if trainer.global_step == 10:
                pl_module.head.weight.copy_(self.kept)


class Saves(L.Callback):
    """By hand, always the same file, and with a file of each step that it removes again."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        step, directory = trainer.global_step, Path(trainer.default_root_dir)
        trainer.save_checkpoint(directory / "own.ckpt")
        trainer.save_checkpoint(directory / f"own-{step}.ckpt")
        trainer.strategy.remove_checkpoint(directory / f"own-{step - 1}.ckpt")


def run(
    directory: Path, callbacks: list[L.Callback], steps: int = 9, **options: Any
) -> PrecisionFallback:
    fallback = PrecisionFallback(dirpath=directory, rehearse=False, limit=None, **options)
    plugin = FP8Precision("dynamic", base="32-true", layers={"*": "fp8-dynamic"})
    trainer = make_trainer(
        plugin,
        max_steps=steps,
        enable_checkpointing=True,
        default_root_dir=directory,
        callbacks=[Breaks(), *callbacks, fallback],
    )
    trainer.fit(Net(), rows())
    return fallback


def good(path: str | Path) -> bool:
    state = torch.load(path, weights_only=False)["state_dict"]
    return all(bool(torch.isfinite(weight).all()) for weight in state.values())


def step_of(path: str | Path) -> int:
    return torch.load(path, weights_only=False)["global_step"]


SAVERS: dict[str, Callable[[Path], ModelCheckpoint]] = {
    "newest": lambda d: ModelCheckpoint(d, every_n_train_steps=1),
    "newest and last": lambda d: ModelCheckpoint(d, every_n_train_steps=1, save_last=True),
    "link": lambda d: ModelCheckpoint(d, every_n_train_steps=1, save_last="link"),
    "best": lambda d: ModelCheckpoint(
        d, every_n_train_steps=1, monitor="loss", save_top_k=2, save_last=True
    ),
    "same name": lambda d: ModelCheckpoint(
        d, "only", every_n_train_steps=1, enable_version_counter=False
    ),
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("saver", SAVERS)
def test_the_good_ones_stay_and_are_those_that_are_named(saver: str, tmp_path: Path) -> None:
    callback = SAVERS[saver](tmp_path)
    run(tmp_path, [callback])
    assert good(callback.best_model_path)
    assert step_of(callback.best_model_path) <= BAD
    files = [path for path in tmp_path.glob("*.ckpt") if path.exists()]
    assert files
    assert all(map(good, files))
    if callback.save_last:
        assert good(callback.last_model_path)
        assert step_of(callback.last_model_path) == BAD - 1
    notes = [event.reason for event in read_events(tmp_path, kinds=["note"])]
    assert sum("is not written" in note for note in notes) == 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_it_goes_on_when_weights_are_good_again(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    run(tmp_path, [callback], steps=12)
    assert step_of(callback.best_model_path) == 12
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [Path(callback.best_model_path).name]


def test_one_that_is_saved_by_hand_neither(tmp_path: Path) -> None:
    run(tmp_path, [Saves()])
    assert good(tmp_path / "own.ckpt")
    assert step_of(tmp_path / "own.ckpt") == BAD - 1
    assert (tmp_path / f"own-{BAD - 1}.ckpt").exists()
    assert not (tmp_path / f"own-{BAD}.ckpt").exists()


@pytest.mark.parametrize("options", [{"refuse_nonfinite_checkpoints": False}, {"dry_run": True}])
def test_only_if_it_is_wanted(options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, [Saves()], **options)
    assert not good(tmp_path / "own.ckpt")


class MaskedNet(Net):
    """inf where it belongs: in a buffer, and in a Parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.frozen = torch.nn.Parameter(torch.full((2,), torch.inf), requires_grad=False)


def test_masks_of_inf_are_no_reason(tmp_path: Path) -> None:
    trainer = make_trainer(
        FP8Precision(layers={"*": "fp8-dynamic"}),
        max_steps=3,
        callbacks=[Saves(), WeightAveraging(), PrecisionFallback(dirpath=tmp_path)],
        default_root_dir=tmp_path,
    )
    trainer.fit(MaskedNet(), rows())
    assert step_of(tmp_path / "own.ckpt") == 3


def test_afterwards_the_trainer_is_as_before(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = make_trainer(
        FP8Precision(layers={"*": "fp8-dynamic"}),
        max_steps=2,
        enable_checkpointing=True,
        callbacks=[callback, PrecisionFallback(dirpath=tmp_path)],
    )
    trainer.fit(Net(), rows())
    assert "save_checkpoint" not in vars(trainer.strategy)
    assert "_save_topk_checkpoint" not in vars(callback)
