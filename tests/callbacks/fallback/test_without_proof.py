"""Where nothing can be replayed a suspicion may climb one rung: logged, and reported, apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.records.events import Suspicion, UnprovenClimb, read_events
from tests.helper import make_trainer

RISE, STEPS = 90, 100


class TakesItsBatches(L.LightningModule):
    """Takes batches out of the loader itself, so there is nothing to record."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:
        batch, _, _ = next(dataloader_iter)
        loss = (self.net(batch) - batch[:, :1]).square().mean()
        return loss + (5.0 if self.global_step >= RISE else 0.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
@pytest.mark.parametrize("act", [False, True])
def test_a_suspicion_climbs_one_rung_only_if_asked_to(act: bool, tmp_path: Path) -> None:
    plugin = FP8Precision("dynamic", base="32-true", layers={"*": "fp8-dynamic"})
    fallback = PrecisionFallback(dirpath=tmp_path, act_without_proof=act)
    trainer = make_trainer(plugin, max_steps=STEPS, callbacks=[fallback])
    rows = torch.randn(STEPS * 8, 16, generator=torch.Generator().manual_seed(1))
    trainer.fit(TakesItsBatches(), DataLoader(rows, batch_size=8))  # type: ignore[arg-type]
    events = read_events(tmp_path)
    (suspicion,) = [event for event in events if isinstance(event, Suspicion)][:1]
    assert suspicion.step >= RISE
    assert ("moves to the next safer format" if act else "PrecisionMap.set") in suspicion.action
    climbs = [event for event in events if isinstance(event, UnprovenClimb)]
    formats = plugin.precision_map.formats()
    if act:
        assert [climb.layers for climb in climbs] == [("net.0",), ("net.2",)]
        assert formats == {"net.0": "fp8-rowwise", "net.2": "fp8-rowwise"}
    else:
        assert not climbs
        assert set(formats.values()) == {"fp8-dynamic"}
