"""Dtypes on purpose, and 16-bit weights that a step writes to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp import FP8Precision, FP16Precision, LossScaling
from tests.cases.programs import Program, error, fit, high, made, weights


class Special(Program):
    """One layer in a dtype that autocast leaves alone."""

    dtype_of_it: Any = torch.complex64

    def build(self) -> Special:
        self.special = nn.Linear(32, 8, dtype=self.dtype_of_it)
        self.first: tuple[Tensor, Tensor] | None = None
        return self

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.to(self.dtype_of_it)
        x = x * (1 - 2j) if x.is_complex() else x
        weight, bias = self.special.weight.detach().clone(), self.special.bias.detach().clone()
        output = self.special(x)
        if self.first is None:
            self.first = output.detach(), nn.functional.linear(x, weight, bias)
        return self.loss(batch) + output.abs().square().mean().float()


@pytest.mark.compatibility(
    "dtypes", "complex and float64 layers", "works with a note", "left alone"
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64], ids=["complex64", "float64"])
@pytest.mark.parametrize(
    "plugin",
    [
        lambda: FP8Precision("delayed"),
        lambda: FP8Precision("rowwise", base="32-true"),
        lambda: FP8Precision("dynamic", layers={"special": "bf16"}),
        lambda: FP16Precision("16-true"),
    ],
    ids=["delayed", "rowwise", "rule", "16-true"],
)
def test_a_dtype_chosen_on_purpose_stays(tmp_path: Path, dtype: Any, plugin: Any) -> None:
    module = made(Special, dtype_of_it=dtype).build()
    fit(module, plugin(), tmp_path)
    assert module.first is not None
    found, expected = module.first
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)


class Twin(Program):
    """A frozen twin follows the network inside of the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = copy.deepcopy(self.head).requires_grad_(False)
        nn.init.zeros_(self.twin.weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.twin.weight.lerp_(self.head.weight, 0.5)
        return self.loss(batch)

    def holds(self) -> bool:
        return self.twin.weight.norm().item() > 0.8 * self.head.weight.norm().item()


class OnSphere(Program):
    """Prototypes are put on the unit sphere before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(32, 12, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight))
        return self.loss(batch) + 1e-3 * self.prototypes(batch).float().square().mean()

    def holds(self) -> bool:
        return bool((self.prototypes.weight.norm(dim=1) - 1).abs().max() < 0.02)


class Boxed(Program):
    """Weights are clipped after the step, in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        norm = nn.utils.clip_grad_norm_(self.parameters(), 1e-3)
        assert torch.isfinite(norm)
        optimizer.step()
        for parameter in self.parameters():
            parameter.data.clamp_(-0.02, 0.02)

    def holds(self) -> bool:
        return weights(self).abs().max().item() <= 0.0201


class Renormed(Program):
    """The forward of the embedding renormalises its rows in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 32, max_norm=0.5)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch + self.table(torch.arange(8) % 6))

    def holds(self) -> bool:
        return bool(self.table.weight.norm(dim=1).max() < 0.6)


class Adversary(Program):
    """The module's own zero_grad, a part frozen for a while, a copy, all inside of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kept: nn.Module | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.zero_grad()
        self.head.requires_grad_(False)
        self.manual_backward(self.loss(batch))
        self.frozen = all(p.grad is None or not p.grad.any() for p in self.head.parameters())
        self.head.requires_grad_(True)
        self.kept = copy.deepcopy(self.body)
        self.optimizers().step()

    def holds(self) -> bool:
        assert self.kept is not None
        return self.frozen and self.kept[0].weight.dtype is torch.float32


@pytest.mark.compatibility("dtypes", "weights written inside of a step, `16-true` too", "works")
@pytest.mark.parametrize("kind", [Twin, OnSphere, Boxed, Renormed, Adversary])
@pytest.mark.parametrize(
    "plugin",
    [
        high,
        lambda: FP8Precision("delayed"),
        lambda: FP16Precision("16-mixed", loss_scaling=LossScaling.static(128)),
        lambda: FP16Precision("16-true", loss_scaling=LossScaling.static(128)),
    ],
    ids=["high", "delayed", "16-mixed", "16-true"],
)
def test_what_a_step_writes_to_weights_lasts(tmp_path: Path, kind: Any, plugin: Any) -> None:
    plain, ours = made(kind), made(kind)
    fit(plain, "bf16-mixed", tmp_path)
    fit(ours, plugin(), tmp_path)
    assert plain.holds()
    assert ours.holds()
    assert error(weights(ours), weights(plain)) < 0.05
