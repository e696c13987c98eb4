"""What counts as a loss spike, and where the loss is read from."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_fp.study import Loss, SpikeRule, find_spikes, read_loss, write_loss
from tests.study.helper import noise, some_events, spiky_loss
from tests.study.outliers import build


def steps_of(loss: Loss, **rule: float) -> list[int]:
    return [spike.step for spike in find_spikes(loss, SpikeRule(**rule))]


def test_spikes_are_found_at_their_onset_on_a_falling_loss():
    events = some_events(10)
    assert steps_of(spiky_loss(events)) == events.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_healthy_runs_have_no_spikes(seed: int):
    at = torch.arange(1, 2001)
    falling = 2 + 8 * torch.exp(-at / 50.0) + 0.05 * torch.randn(2000)
    smoothed = 2 + 0.05 * noise(2000, seed=seed, memory=0.9)
    growing_noise = 2 + 1e-4 * at * torch.randn(2000)
    for values in (falling, smoothed, growing_noise, torch.full((2000,), 2.0)):
        assert steps_of(Loss.of(at, values)) == []


def test_heights_are_in_units_of_the_noise():
    values = 3 + 0.02 * torch.randn(500).double()
    values[300] += 0.4
    (spike,) = find_spikes(Loss.of(range(500), values))
    assert spike.height == pytest.approx(20, rel=0.3)
    scaled = find_spikes(Loss.of(range(500), values * 1e-4))
    assert scaled[0].height == pytest.approx(spike.height)
    assert steps_of(Loss.of(range(500), values), threshold=40) == []


def test_outliers_close_to_each_other_are_one_spike():
    values = 3 + 0.02 * torch.randn(500)
    values[[200, 210, 220, 236, 253]] += 2
    assert steps_of(Loss.of(range(500), values)) == [200, 253]
    assert steps_of(Loss.of(range(500), values), refractory=9) == [200, 210, 220, 236, 253]


def test_a_loss_that_is_not_finite_is_one_spike_as_long_as_it_lasts():
    values = 3 + 0.02 * torch.randn(500)
    values[100] = torch.inf
    values[200:300] = torch.nan
    assert steps_of(Loss.of(range(500), values)) == [100, 200]
    values[50:] = torch.nan
    assert steps_of(Loss.of(range(500), values)) == [50]


def test_a_short_loss_has_no_spikes():
    assert steps_of(Loss.of([1], [2.0])) == []
    assert steps_of(Loss.of(range(10), [2.0] * 9 + [9.0])) == []


@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": 0},
        {"threshold": float("nan")},
        {"level": 0},
        {"history": 0},
        {"armed": 0},
        {"refractory": 0},
    ],
)
def test_rules_out_of_range_are_refused(rule: dict):
    with pytest.raises(ValueError, match=f"{next(iter(rule))} must be"):
        SpikeRule(**rule)


# --- reading ------------------------------------------------------------------------------------


def test_loss_of_refuses_what_is_no_curve():
    with pytest.raises(ValueError, match="one value per step, got 1 for 2"):
        Loss.of([1, 2], [1.0])
    with pytest.raises(ValueError, match="finite values, got 2 that are not"):
        Loss.of([1, 2], [torch.nan, torch.inf])
    with pytest.raises(ValueError, match="finite values, got 0"):
        Loss.of([], [])


def test_the_loss_record_comes_first(tmp_path: Path):
    write_loss(tmp_path, Loss.of([1, 2, 3], [3.0, torch.nan, 1.0]))
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\n0,0,5.0\n")
    loss = read_loss(tmp_path)
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values.isnan().tolist() == [False, True, False]


def test_lightnings_csv_counts_steps_from_0(tmp_path: Path):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, loader = build()
    trainer.fit(module, loader)
    trainer.logger.log_metrics({"fp8/share": 1.0}, step=3)  # as ClampMonitor does
    trainer.logger.save()
    loss = read_loss(tmp_path)
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values[2] == pytest.approx(float(trainer.callback_metrics["train_loss"]), rel=1e-4)


def test_two_columns_of_any_name(tmp_path: Path):
    path = tmp_path / "curve.csv"
    path.write_text("batch,L\n1,3.0\n2,nan\n3,1.0\n")
    loss = read_loss(tmp_path, file=path)
    assert loss.steps.tolist() == [1, 2, 3]
    pq.write_table(pa.table({"step": [7], "x": [1.0]}), tmp_path / "curve.parquet")
    assert read_loss(tmp_path, file=tmp_path / "curve.parquet").steps.tolist() == [7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no loss in .* it has neither loss.csv nor metrics.csv"),
        (
            "epoch,step,val_loss\n0,0,5.0\n",
            "no column 'train_loss' .* it has epoch, step, val_loss",
        ),
        ("epoch,step,train_loss\n0,0,a\n", "'train_loss' of .*metrics.csv'"),
        ("epoch,step,train_loss\n0,0,\n0,1,\n", "must have finite values"),
        ("a,b,c\n1,2\n", "metrics.csv' cannot be read"),
    ],
)
def test_a_loss_that_is_not_there_is_refused(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_loss(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        read_loss(tmp_path, file=tmp_path / "nope.csv")
