"""What Lightning is told to switch off is off, and the run goes on as without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_fp import (
    ClampMonitor,
    EvaluationGap,
    FP8Precision,
    ParityProbe,
    PrecisionFallback,
    RolloutRecipe,
    Stage,
    StagedRollout,
)
from tests.helper import LanguageModel, make_trainer, text_loader

RECIPE = RolloutRecipe(
    name="short",
    stages=(
        Stage(name="high", layers={"*": "high"}, until={"steps": 1}),
        Stage(name="low", layers={"*": "configured"}),
    ),
)

OPTIONS: list[tuple[dict[str, Any], int]] = [
    # Trainer's options, steps that Lightning makes
    ({"log_every_n_steps": 0}, 4),
    ({"limit_train_batches": 0}, 0),
    ({"limit_val_batches": 0}, 4),
    ({"max_steps": 0}, 0),
    ({"max_steps": -1, "max_epochs": 0}, 0),
    ({"num_sanity_val_steps": -1}, 4),
    ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 4),
    ({"gradient_clip_val": 0}, 4),
    ({"gradient_clip_val": 0.0, "gradient_clip_algorithm": "value"}, 4),
    ({"logger": []}, 4),
    ({"fast_dev_run": True}, 1),
    ({"overfit_batches": 2}, 4),
    ({"inference_mode": False}, 4),
    ({"log_every_n_steps": 10**9}, 4),
]


@pytest.mark.parametrize(("options", "steps"), OPTIONS, ids=str)
def test_every_callback_and_a_switch(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    monitor = ClampMonitor(every_n_steps=2)
    callbacks: list[L.Callback] = [monitor, PrecisionFallback(), StagedRollout(RECIPE)]
    callbacks += [ParityProbe(every_n_steps=3), EvaluationGap()]
    trainer = make_trainer(
        FP8Precision("delayed"),
        callbacks=callbacks,
        **{"max_steps": 4, "default_root_dir": tmp_path, **options},
    )
    trainer.fit(LanguageModel(blocks=1), text_loader(20), text_loader(8))
    assert trainer.global_step == steps
    assert not monitor._log.failed
    if "fast_dev_run" in options:
        assert list(tmp_path.iterdir()) == []


def test_barebones() -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, barebones=True, max_steps=2, plugins=FP8Precision("delayed")
    )
    trainer.fit(LanguageModel(blocks=1), text_loader(20))
    assert trainer.global_step == 2
