"""LossSpikeScore against a brute force, in pieces, in a Trainer and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp.metrics import LossSpikeScore


def losses(seed: int, steps: int = 600) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = 3 + 0.05 * rng.standard_normal(steps)
    values[rng.integers(0, steps, 12)] += rng.uniform(0.2, 3, 12)
    values[rng.integers(0, steps, 4)] = math.nan
    values[rng.integers(0, steps, 4)] = math.inf
    return values


def brute_force(values: np.ndarray, window: int, threshold: float) -> float:
    spikes, before = 0, []
    for value in values:
        last = np.array(before[-window:])
        if not math.isfinite(value):
            spikes += 1
            continue
        if len(last) == window and value > last.mean() + threshold * last.std():
            spikes += 1
        before.append(value)
    return spikes / len(values)


@pytest.mark.parametrize(("window", "threshold"), [(128, 7.0), (16, 3.0), (2, 5.0)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_brute_force(seed: int, window: int, threshold: float) -> None:
    values = losses(seed)
    metric = LossSpikeScore(window=window, threshold=threshold)
    metric.update(torch.from_numpy(values))
    assert metric.compute().item() == brute_force(values, window, threshold) > 0


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 200))
def test_pieces_and_single_losses_are_the_same(cut: int) -> None:
    values = torch.from_numpy(losses(0, 200))
    whole, parts = LossSpikeScore(window=32), LossSpikeScore(window=32)
    whole.update(values)
    parts.update(values[:cut])
    for value in values[cut:]:
        parts.update(value)
    assert parts.compute() == whole.compute()


def test_forward_tells_of_its_own_steps() -> None:
    metric = LossSpikeScore(window=4)
    metric.update(torch.tensor([2.0, 2.1, 2.0, 2.1]))
    assert metric(3.0) == 1
    assert metric(torch.tensor(2.0)) == 0
    assert metric.compute().item() == pytest.approx(1 / 6)


def test_without_noise_nothing_is_a_jump() -> None:
    metric = LossSpikeScore(window=8)
    metric.update(torch.tensor([2.0] * 8 + [3.0]))
    assert metric.compute() == 0


def test_before_the_first_step() -> None:
    metric = LossSpikeScore()
    metric.update(torch.zeros(0))
    assert metric.compute() == 0


def test_reset_forgets_the_window() -> None:
    metric = LossSpikeScore(window=4)
    metric.update(torch.tensor([2.0, 2.1, 2.0, 2.1]))
    metric.reset()
    metric.update(3.0)
    assert metric.compute() == 0


def test_its_window_stays_exact_in_a_module_of_a_smaller_dtype() -> None:
    module = torch.nn.ModuleList([LossSpikeScore(window=4)]).to(torch.bfloat16)
    assert module[0].recent.dtype == torch.float64
    module[0].update(torch.tensor([1.0, 1.001, 1.0, 1.001, 1.02]))
    assert module[0].compute() == 0.2


def test_saved_and_loaded_it_continues() -> None:
    values = torch.from_numpy(losses(1))
    whole, first = LossSpikeScore(window=32), LossSpikeScore(window=32)
    for metric in (whole, first):
        metric.persistent(True)
    whole.update(values)
    first.update(values[:300])
    second = LossSpikeScore(window=32)
    second.persistent(True)
    second.load_state_dict(first.state_dict())
    second.update(values[300:])
    assert second.compute() == whole.compute()


def gathered(*ranks: LossSpikeScore) -> Any:
    """What torchmetrics calls to gather a state: here, that of every rank."""
    names = iter(("spikes", "steps", "recent"))
    return lambda state, group: [getattr(rank, name) for name in [next(names)] for rank in ranks]


def test_ranks_add_up_and_keep_their_windows() -> None:
    values = torch.from_numpy(losses(2))
    ranks = [LossSpikeScore(window=32) for _ in range(2)]
    for rank, part in zip(ranks, values.chunk(2), strict=True):
        rank.update(part)
    shares = [rank.compute().item() for rank in ranks]
    window = ranks[0].recent.clone()
    ranks[0].sync(dist_sync_fn=gathered(*ranks), distributed_available=lambda: True)
    assert (ranks[0].spikes / ranks[0].steps).item() == pytest.approx(sum(shares) / 2)
    ranks[0].unsync()
    torch.testing.assert_close(ranks[0].recent, window)


class Logs(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.score = LossSpikeScore(window=4)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.score(batch[0].squeeze())
        self.log("spikes", self.score, on_step=False, on_epoch=True)
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_in_self_log(tmp_path: Path) -> None:
    values = torch.tensor([2.0, 2.1, 2.0, 2.1, 3.0]).reshape(5, 1)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Logs(), DataLoader(TensorDataset(values), batch_size=1))
    assert trainer.callback_metrics["spikes"].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 1}, "window must be at least 2"), ({"threshold": 0}, "threshold must be greater")],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSpikeScore(**options)


def test_a_loss_per_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="loss must be a scalar or 1-d"):
        LossSpikeScore().update(torch.zeros(2, 2))
