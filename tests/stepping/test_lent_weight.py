"""What a step of 16-true does to its weights themselves, beside plain PyTorch on float32 ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import FP16Precision, LossScaling
from lightning_fp.stepping.lent_weight import LentWeight
from lightning_fp.stepping.working_copies import WorkingCopies
from tests.helper import make_trainer

# -- one copy -------------------------------------------------------------------------------------


def lent(module: nn.Module) -> WorkingCopies:
    copies = WorkingCopies()
    copies.lend(module, torch.float16)
    return copies


def test_only_what_was_written_is_written_back() -> None:
    """Elements that nobody touched keep the bits that 16-bit numbers do not have."""
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    copies = lent(layer)
    layer.weight.data[0].fill_(2.0)
    with torch.no_grad():
        layer.bias.add_(1.0)
    copies.take_back()
    assert torch.equal(layer.weight[0], torch.full((4,), 2.0))
    assert torch.equal(layer.weight[1:], before[1:])
    assert layer.bias.dtype is torch.float32
    assert not isinstance(layer.weight, LentWeight)


def test_an_optimizers_step_is_not_undone_by_whoever_looked_at_the_data() -> None:
    layer = nn.Linear(4, 4)
    copies = lent(layer)
    layer.weight.data.norm()
    copies.write_back()  # as before each step
    with torch.no_grad():
        copies._weights[0].master.add_(1.0)
    after = copies._weights[0].master.detach().clone()
    copies.take_back()
    assert torch.equal(layer.weight, after)
    layer_too = nn.Linear(4, 4)
    copies = lent(layer_too)
    held = layer_too.weight.data
    with torch.no_grad():
        copies._weights[0].master.add_(1.0)  # by somebody who asked nobody
    held.norm()
    after = copies._weights[0].master.detach().clone()
    copies.take_back()
    assert torch.equal(layer_too.weight, after)


def test_tied_weights_are_one_copy_and_gradients_come_to_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    master = model[0].weight
    copies = lent(model)
    assert model[0].weight is model[1].weight is not master
    model(torch.ones(2, 4, dtype=torch.float16)).float().sum().backward()
    assert model[0].weight.grad is master.grad is not None
    model.zero_grad()
    assert master.grad is None
    model[0].weight.requires_grad = False
    assert model[0].weight is model[1].weight
    assert not model(torch.ones(2, 4, dtype=torch.float16)).requires_grad
    copies.take_back()
    assert model[0].weight is model[1].weight is master
    assert not master.requires_grad


def test_what_is_written_after_a_change_of_requires_grad_is_kept_too() -> None:
    layer = nn.Linear(4, 4)
    copies = lent(layer)
    layer.weight.data[0].fill_(1.0)
    layer.weight.requires_grad_(False)
    layer.weight.data[1].fill_(2.0)
    layer.weight.requires_grad_(True)
    layer.weight.data[2].fill_(3.0)
    copies.lend(layer, torch.float16)  # as after an optimizer's step
    assert layer.weight[:3, 0].tolist() == [1, 2, 3]
    copies.take_back()
    assert layer.weight[:3, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_and_checkpoints_made_in_a_step_are_float32(how: str) -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    copies = lent(layer)
    if how == "state_dict":
        found = layer.state_dict()["weight"]
    else:
        made = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
        found = made.weight
        assert type(found) is nn.Parameter
    copies.take_back()
    assert torch.equal(found, before)
    assert layer.state_dict()["weight"].data_ptr() == layer.weight.data_ptr()


# -- programs that write to their weights in a step -----------------------------------------------


class Program(L.LightningModule):
    """x [B, 16] to its mean, in manual optimization; `act` is what it does to its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
        self.extra = self.more()

    def more(self) -> nn.Module:
        return nn.Linear(1, 1)

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.before(x)
        loss = (self.body(x).float() - x.float().mean(dim=1, keepdim=True)).square().mean()
        self.manual_backward(loss + 0 * self.use(x))
        self.between()
        optimizer.step()
        self.after()

    def before(self, x: Tensor) -> None: ...
    def use(self, x: Tensor) -> Tensor | float:
        return 0.0

    def between(self) -> None: ...
    def after(self) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def check(self) -> None:
        raise NotImplementedError


class Momentum(Program):
    """MoCo, BYOL: a frozen twin follows the network."""

    def more(self) -> nn.Module:
        twin = copy.deepcopy(self.body).requires_grad_(False)
        for parameter in twin.parameters():
            parameter.data.zero_()
        return twin

    def before(self, x: Tensor) -> None:
        with torch.no_grad():
            for own, twin in zip(self.body.parameters(), self.extra.parameters(), strict=True):
                twin.data.mul_(0.5).add_(own.data, alpha=0.5)

    def use(self, x: Tensor) -> Tensor:
        return self.extra(x).float().mean()

    def check(self) -> None:
        own, twin = self.body[0].weight, self.extra[0].weight
        assert (own - twin).norm() < 0.2 * own.norm()


class Prototypes(Program):
    """SwAV: prototypes are put on the unit sphere before each step."""

    def more(self) -> nn.Module:
        return nn.Linear(16, 8, bias=False)

    def before(self, x: Tensor) -> None:
        with torch.no_grad():
            self.extra.weight.copy_(nn.functional.normalize(7 * self.extra.weight, dim=1))

    def use(self, x: Tensor) -> Tensor:
        return self.extra(x).float().mean()

    def check(self) -> None:
        norms = self.extra.weight.norm(dim=1)
        assert (norms - 1).abs().max() < 0.01


class Clipped(Program):
    """WGAN with weight clipping, after the step."""

    def after(self) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.01, 0.01)

    def check(self) -> None:
        assert max(p.abs().max().item() for p in self.parameters()) <= 0.01001


class ClippedByHand(Program):
    """Gradients clipped over self.parameters(), and looked at."""

    norms: list[float] = []  # noqa: RUF012

    def between(self) -> None:
        self.norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), 1e-4)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def check(self) -> None:
        assert all(norm > 1e-3 for norm in self.norms)
        fresh = type(self)()
        moved = [(a - b).norm() for a, b in zip(self.parameters(), fresh.parameters(), strict=True)]
        assert 0 < sum(moved) < 4 * 2e-4


class MaxNorm(Program):
    """An embedding that renormalises its rows in its forward."""

    def more(self) -> nn.Module:
        embedding = nn.Embedding(8, 16, max_norm=1.0)
        embedding.weight.data.mul_(10)
        return embedding

    def use(self, x: Tensor) -> Tensor:
        return self.extra(torch.arange(8)).float().mean()

    def check(self) -> None:
        assert self.extra.weight.norm(dim=1).max() < 1.01


class Frozen(Program):
    """A critic that is frozen while it judges."""

    def more(self) -> nn.Module:
        return nn.Linear(16, 1)

    def use(self, x: Tensor) -> Tensor:
        self.extra.requires_grad_(False)
        judged = self.extra(x).float().mean()
        self.extra.requires_grad_(True)
        return judged

    def between(self) -> None:
        assert self.extra.weight.grad is None
        assert self.body[0].weight.grad is not None

    def check(self) -> None:
        assert self.extra.weight.requires_grad
        assert type(self.extra.weight) is nn.Parameter


class Toggled(Program):
    """A GAN as in Lightning's examples: while one network learns, the other asks for nothing."""

    def more(self) -> nn.Module:
        return nn.Linear(16, 16)

    def training_step(self, x: Tensor, index: int) -> None:
        for own in (1, 0, 1):
            optimizer = self.optimizers()[own]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.body(self.extra(x)).float().square().mean())
            asking = [p.requires_grad for p in (self.body[0].weight, self.extra.weight)]
            assert asking == [own == 0, own == 1]
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=1e-2) for net in (self.body, self.extra)]

    def check(self) -> None:
        assert (self.extra.weight - type(self)().extra.weight).norm() > 1e-3
        assert all(type(p) is nn.Parameter and p.requires_grad for p in self.parameters())


PROGRAMS = [Momentum, Prototypes, Clipped, ClippedByHand, MaxNorm, Frozen, Toggled]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_that_write_to_their_weights(program: type[Program]) -> None:
    data = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    found: dict[str, Program] = {}
    for name, plugin in (
        ("plain", None),
        ("ours", FP16Precision("16-true", loss_scaling=LossScaling.static(128))),
    ):
        program.norms = []  # pyright: ignore
        found[name] = model = program()
        make_trainer(plugin, max_epochs=1).fit(model, DataLoader(data, batch_size=8))
        model.check()
    states: list[dict[str, Any]] = [model.state_dict() for model in found.values()]
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=2e-3), key
