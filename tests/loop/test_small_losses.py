"""A loss whose shares mean nothing convicts nobody: it is around zero, or comes to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.loop import PrecisionLoop
from lightning_fp.records.events import Demotion, read_events

STEPS = 100


class Policy(nn.Module):
    """A policy gradient: the action is drawn from what the net says, the advantage has mean 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
        )

    def batch(self, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(32, 16, generator=dice), torch.rand(32, generator=dice)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        state, draw = batch
        scores = self.net(state).float()
        steps = scores.softmax(-1).detach().cumsum(-1)
        action = (draw[:, None] > steps).sum(-1).clamp(max=3)
        reward = (action == state[:, :4].argmax(-1)).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-3)
        return -(advantage * scores.log_softmax(-1).gather(1, action[:, None])[:, 0]).mean()


class Separable(nn.Module):
    """A BatchNorm net that makes no mistakes after a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4)
        )

    def batch(self, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        kinds = torch.randint(4, (32,), generator=dice)
        return 0.3 * torch.randn(32, 16, generator=dice) + 3 * F.one_hot(kinds, 16), kinds

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])


@pytest.mark.parametrize(("net", "most"), [(Policy, 0.0), (Separable, 0.01)])
def test_nobody_is_demoted(net: type[Policy | Separable], most: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dice = net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if net is Policy else 1e-2)
    loop = PrecisionLoop(
        model,
        optimizer,
        "fp8-delayed",
        layers={"*": "fp8-delayed"},
        base="32-true",
        dirpath=tmp_path,
        progress=False,
        monitor=False,
        max_steps=STEPS,
    )
    losses = [float(loop.step(model.loss, model.batch(dice))) for _ in range(STEPS)]
    assert sum(losses[-20:]) / 20 < most  # it is learned, and the loss is small
    assert set(loop.precision_map.formats().values()) == {"fp8-delayed"}
    assert not any(isinstance(event, Demotion) for event in read_events(tmp_path))
