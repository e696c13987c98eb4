"""EvaluationGap: two evaluations of the same batches, and no trace of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric

from lightning_fp import FP8Precision, FP16Precision
from lightning_fp.callbacks import EvaluationGap
from lightning_fp.records import read_evaluation
from tests.helper import LanguageModel, make_trainer, next_byte_loss, same_weights, text_loader


class Evaluated(LanguageModel):
    """Its validation draws random numbers, counts, has a metric, and logs."""

    def __init__(self, how: str = "returned", **options: Any) -> None:
        super().__init__(dropout=0.1, **options)
        self.how = how
        self.register_buffer("validated", torch.zeros(()))
        self.mean = MeanMetric()

    def validation_step(self, batch: Tensor, index: int, dataloader_idx: int = 0) -> Any:
        torch.rand(3)
        self.validated += 1
        loss = next_byte_loss(self, batch) + 1e-3 * torch.rand(())
        batch.zero_()  # a step may do as it likes with its batch
        self.val_losses.append(loss.item())
        self.mean.update(loss)
        self.log("val_loss", loss)
        self.log("val_mean", self.mean)
        if self.how == "mapping":
            return {"loss": loss, "predictions": None}
        return loss if self.how == "returned" else None


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def run(
    model: L.LightningModule, plugin: Any = None, *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    plugin = FP8Precision(base="32-true") if plugin is None else plugin
    defaults = {"max_steps": 8, "val_check_interval": 4, "limit_val_batches": 3}
    trainer = make_trainer(plugin, callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(model, text_loader(80), text_loader(24))
    return trainer


@pytest.mark.parametrize("fp8_eval", [False, True])
def test_the_gap_is_that_of_the_runs_own_evaluations(tmp_path: Path, fp8_eval: bool) -> None:
    """The same run, once evaluated in FP8 and once in high precision, has these two losses."""
    means = {}
    for other in (False, True):
        model = Evaluated()
        run(model, FP8Precision("delayed", base="32-true", fp8_eval=other))
        means[other] = [sum(model.val_losses[i : i + 3]) / 3 for i in (0, 3)]
    gap = EvaluationGap(dirpath=tmp_path)
    trainer = run(
        Evaluated(), FP8Precision("delayed", base="32-true", fp8_eval=fp8_eval), gap, max_steps=8
    )
    rows = read_evaluation(tmp_path).to_pylist()
    assert [row["step"] for row in rows] == [4, 8]
    # The random part of this loss depends on where the generator stands: 1e-3 at most.
    assert [row["loss"] for row in rows] == pytest.approx(means[True], abs=1e-3)
    assert [row["loss_high"] for row in rows] == pytest.approx(means[False], abs=1e-3)
    assert rows[-1]["gap"] == (rows[-1]["loss"] - rows[-1]["loss_high"]) / rows[-1]["loss_high"]
    assert rows[-1]["gap"] != 0
    assert trainer.callback_metrics["precision/eval_gap"].item() == pytest.approx(rows[-1]["gap"])
    assert gap.latest is not None
    assert gap.latest.gap == rows[-1]["gap"]


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    """Weights, losses, metrics, buffers, histories and random numbers are those without it."""
    found = []
    for callbacks in ([], [EvaluationGap(dirpath=tmp_path)]):
        model, plugin = Evaluated(), FP8Precision("delayed", base="32-true")
        trainer = run(model, plugin, *callbacks, accumulate_grad_batches=2, val_check_interval=3)
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k[:3] == "val"}
        scales = plugin.precision_map.state_dict()["scales"]
        found.append((model, logged, scales, torch.rand(4)))
    (one, logged, scales, after), (other, *others) = found
    assert len(read_evaluation(tmp_path)) > 1
    assert same_weights(one, other)  # with the buffer
    assert (one.losses, one.val_losses) == (other.losses, other.val_losses)
    assert logged == others[0]
    assert logged["val_mean"] == pytest.approx(logged["val_loss"])
    assert all(map(torch.equal, tensors(scales), tensors(others[1])))
    assert any(tensor.any() for tensor in tensors(scales))
    assert torch.equal(after, others[2])


@pytest.mark.parametrize("how", ["mapping", "logged"])
def test_where_the_loss_comes_from(tmp_path: Path, how: str) -> None:
    gaps = []
    for each in ("returned", how):
        gap = EvaluationGap(dirpath=tmp_path / each)
        run(Evaluated(each), None, gap, max_steps=4)
        gaps.append(gap.latest)
    assert gaps[0] is not None
    assert gaps[0] == gaps[1]


def test_high_precision_has_no_gap(tmp_path: Path) -> None:
    gap = EvaluationGap(dirpath=tmp_path)
    run(Evaluated(), FP8Precision(base="bf16-mixed", layers={"*": "bf16"}), gap, max_steps=4)
    assert gap.latest is not None
    assert gap.latest.loss == gap.latest.loss_high > 1
    assert gap.latest.gap == 0


def test_fp16_against_bf16(tmp_path: Path) -> None:
    gap = EvaluationGap(dirpath=tmp_path)
    run(Evaluated(), FP16Precision(), gap, max_steps=4)
    assert gap.latest is not None
    assert 0 < abs(gap.latest.gap) < 0.01


def test_chosen_validations_and_batches(tmp_path: Path) -> None:
    class Count(EvaluationGap):
        evaluated = 0

        def _evaluate(self, *args: Any) -> float:
            Count.evaluated += 1
            return super()._evaluate(*args)

    gap = Count(2, 2, dirpath=tmp_path)
    # A sanity check is no validation.
    run(Evaluated(), None, gap, max_steps=8, val_check_interval=2, num_sanity_val_steps=1)
    assert read_evaluation(tmp_path)["step"].to_pylist() == [4, 8]
    assert Count.evaluated == 2 * 2 * 2
    resumed = EvaluationGap(2, dirpath=tmp_path)
    resumed.load_state_dict({**gap.state_dict(), "validations": 1})
    run(Evaluated(), None, resumed, max_steps=2, val_check_interval=2)
    assert resumed.latest is not None


def test_a_checkpoint_can_go_by_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="precision/eval_gap", filename="{step}")
    gap = EvaluationGap(dirpath=tmp_path)
    run(Evaluated(), None, gap, best, enable_checkpointing=True)
    assert best.best_model_score is not None
    gaps = read_evaluation(tmp_path)["gap"].to_pylist()
    assert best.best_model_score.item() == pytest.approx(min(gaps))


def test_several_loaders_and_a_validation_alone(tmp_path: Path) -> None:
    model, plugin, gap = Evaluated(), FP8Precision(base="32-true"), EvaluationGap()
    trainer = make_trainer(plugin, callbacks=[gap], default_root_dir=tmp_path)
    trainer.validate(model, [text_loader(8), text_loader(8)], verbose=False)
    assert gap.latest is not None
    assert "precision/eval_gap" in trainer.callback_metrics
    assert len(model.val_losses) == 4
    assert not list(tmp_path.rglob("eval_gap.csv"))


def test_without_a_loss_it_says_so_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, gap = Evaluated("logged"), EvaluationGap(metric="val_los", dirpath=tmp_path)
    with caplog.at_level(logging.WARNING):
        run(model, None, gap)
    said = [record.getMessage() for record in caplog.records if "gap" in record.getMessage()]
    assert len(said) == 1
    assert "log it as 'val_los', got NoneType; it logs val_loss, val_mean" in said[0]
    assert len(model.losses) == 8
    assert gap.latest is None
    assert len(read_evaluation(tmp_path)) == 0


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_refusals() -> None:
    with pytest.raises(ValueError, match="every_n_validations must be at least 1, got 0"):
        EvaluationGap(0)
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        EvaluationGap(batches=0)
    plain = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(ValueError, match=r"EvaluationGap needs .* got MixedPrecision"):
        run(Evaluated(), plain, EvaluationGap())

    class Iterates(Evaluated):
        def validation_step(self, dataloader_iter: Any) -> None: ...

    with pytest.raises(ValueError, match="cannot be evaluated twice"):
        run(Iterates(), None, EvaluationGap())
