"""The weight's cast shared by the micro-batches of one step: bit for bit what it is without."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_fp import DelayedScaling, FP8Precision, PrecisionMap, convert
from lightning_fp.kernels import native, operand
from lightning_fp.numerics import FloatFormat
from tests.helper import make_trainer

MICRO_BATCHES = 4


class Counted:
    """Calls of `cast_operand` with each weight, the real one underneath."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[torch.Size] = []
        self._cast = native.cast_operand
        for module in (native, operand):  # forward's, and backward's
            monkeypatch.setattr(module, "cast_operand", self)

    def __call__(
        self, x: Tensor, scale: Tensor, format: FloatFormat, wide: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        self.shapes.append(x.shape)
        return self._cast(x, scale, format, wide)

    def take(self, weight: Tensor) -> int:
        """How often this weight was cast since the last time; no other operand has its shape."""
        count = self.shapes.count(weight.shape)
        self.shapes.clear()
        return count


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


class Experts(nn.Module):
    """The second of two linear layers sees only the micro-batches that `routed` says."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 80), nn.Linear(80, 48)
        self.checkpointed = checkpointed  # reentrant or not; None: not at all
        self.routed = range(MICRO_BATCHES)

    def forward(self, x: Tensor, micro_batch: int) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            return self.second(x) if micro_batch in self.routed else x[:, :48]

        if self.checkpointed is None:
            return inner(x)
        return checkpoint(inner, x, use_reentrant=self.checkpointed)


def converted(model: nn.Module, share: bool, format: str = "fp8-delayed") -> PrecisionMap:
    table = convert(model, format, {"*": format}).precision_map
    table.scale_history.share_weight_casts = share
    return table


def train(
    model: Experts,
    table: PrecisionMap,
    steps: int = 4,
    after_micro_batch: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Everything a run leaves: losses, gradients, weights, histories, what was watched."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    left: list[Tensor] = []
    for step in range(steps):
        for micro_batch in range(MICRO_BATCHES):
            x = torch.randn(16, 48, generator=generator).requires_grad_()
            loss = (model(x, micro_batch) - 0.1).square().mean()
            loss.backward()
            table.after_backward()
            left += [loss.detach(), x.grad.clone()]
            if after_micro_batch is not None:
                after_micro_batch(step, micro_batch)
        left += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        table.step()
        history = table.scale_history
        left += [table.state_dict()["scales"]["history"], history.take_amax_record().values]
    return left


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointed", [None, True, False], ids=["plain", "reentrant", "not"])
def test_bit_for_bit(checkpointed: bool | None, counted: Counted) -> None:
    left, casts = [], []
    for share in (False, True):
        model = Experts(checkpointed)
        table = converted(model, share)
        left.append(train(model, table, steps=1))  # in which scales are found
        counted.take(model.first.weight)
        left[-1] += train(model, table, steps=3)
        casts.append(counted.take(model.first.weight))
    same(*left)
    forwards = MICRO_BATCHES * (1 if checkpointed is None else 2)
    assert casts == [3 * (forwards + MICRO_BATCHES), 3]


def test_a_layer_first_used_in_the_third_micro_batch(counted: Counted) -> None:
    left = []
    for share in (False, True):
        model = Experts()
        model.routed = range(2, MICRO_BATCHES)
        table = converted(model, share)
        left.append(train(model, table, steps=1))
        counted.take(model.second.weight)
        left[-1] += train(model, table, steps=2)
    same(*left)
    assert counted.take(model.second.weight) == 2


def test_a_weight_that_is_not_finite_is_counted_as_without() -> None:
    left = []
    for share in (False, True):
        model = Experts()
        table = converted(model, share)

        def spoil(step: int, micro_batch: int, model: Experts = model) -> None:
            if (step, micro_batch) == (2, 3):
                with torch.no_grad():
                    model.first.weight[3, 5] = torch.inf

        left.append(train(model, table, steps=4, after_micro_batch=spoil)[-1])
    assert left[0][0, 1, 2] > 0  # elements of the first layer's weight that are not finite
    assert torch.equal(left[0], left[1])


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "other storage"])
def test_a_weight_that_changes_within_a_step_is_cast_again(how: str, counted: Counted) -> None:
    left = []
    for share in (False, True):
        model = Experts()
        table = converted(model, share)

        def change(step: int, micro_batch: int, model: Experts = model) -> None:
            if micro_batch != 1:
                return
            changed = model.first.weight.detach() * 1.5
            if how == "in place":
                with torch.no_grad():
                    model.first.weight.mul_(1.5)
            elif how == "load_state_dict":
                model.load_state_dict({"first.weight": changed}, strict=False)
            else:
                model.first.weight.data = changed

        left.append(train(model, table, steps=1, after_micro_batch=change))
        counted.take(model.first.weight)
        left[-1] += train(model, table, steps=2, after_micro_batch=change)
    same(*left)
    assert counted.take(model.first.weight) == 2 * 2


def test_weights_made_for_each_micro_batch() -> None:
    """By a hypernetwork: each lies in memory where the last one did, with its version."""
    target = nn.Linear(48, 80, bias=False)
    table = converted(target, share=True)
    x = torch.randn(16, 48)
    errors = []
    for _ in range(3):
        for micro_batch in range(MICRO_BATCHES):
            made = torch.randn(80, 48).mul(micro_batch + 1).requires_grad_()
            output = functional_call(target, {"weight": made}, (x,))
            output.square().mean().backward()
            table.after_backward()
            want = x @ made.detach().t()
            errors.append((output.detach() - want).norm() / want.norm())
            del made, output
        table.step()
    assert max(errors[MICRO_BATCHES:]) < 0.06


def test_optimizers_that_move_weights_unseen_between_closures() -> None:
    """By `.data`, which raises no version: SAM and its kin, of years of published code."""

    class Ascent(torch.optim.SGD):
        def step(self, closure: Callable[[], Any]) -> Any:
            closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(1.5)
            return closure()

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 80, bias=False)
            self.errors: list[Tensor] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            output, want = self.layer(batch), batch @ self.layer.weight.detach().t()
            self.errors.append((output.detach() - want).norm() / want.norm())
            return output.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Ascent(self.parameters(), lr=1e-3)

    plugin = FP8Precision(DelayedScaling(margin=1), base="32-true")
    trainer = make_trainer(plugin, max_epochs=1, accumulate_grad_batches=2)
    model = Model()
    trainer.fit(model, DataLoader(torch.randn(12, 16, 48), batch_size=None))
    assert len(model.errors) == 18
    assert max(model.errors) < 0.06


class Switched(L.Callback):
    """Turns sharing off at the start, and counts the casts that are kept."""

    def __init__(self, off: bool) -> None:
        self.off, self.kept = off, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.off:
            plugin: Any = trainer.precision_plugin
            plugin.precision_map.scale_history.share_weight_casts = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.kept += pl_module.layer.memory.weight_cast is not None


@pytest.mark.parametrize("off", [False, True])
def test_what_a_user_has_turned_off_stays_off_in_a_trainer(off: bool) -> None:
    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 80)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    switched = Switched(off)
    plugin = FP8Precision(DelayedScaling(), base="32-true", layers={"*": "fp8-delayed"})
    trainer = make_trainer(plugin, max_epochs=1, accumulate_grad_batches=2, callbacks=[switched])
    trainer.fit(Model(), DataLoader(torch.randn(12, 16, 48), batch_size=None))
    assert (switched.kept == 0) is off


def test_nothing_is_kept_after_the_step() -> None:
    model = Experts()
    table = converted(model, share=True)
    kept: list[weakref.ref[Tensor]] = []

    def look(step: int, micro_batch: int) -> None:
        memory = model.first.memory
        assert memory is not None
        if step == 1 and memory.weight_cast is not None:
            assert memory.weight_cast.cast.element_size() == 1
            kept.append(weakref.ref(memory.weight_cast.cast))

    train(model, table, steps=2, after_micro_batch=look)
    gc.collect()
    assert len(kept) == MICRO_BATCHES
    assert all(cast() is None for cast in kept)


@pytest.mark.parametrize("options", [{"share": False}, {"share": True, "format": "fp8-dynamic"}])
def test_only_where_asked_and_delayed(options: dict[str, Any], counted: Counted) -> None:
    model = Experts()
    table = converted(model, **options)
    train(model, table, steps=1)
    counted.take(model.first.weight)
    train(model, table, steps=1)
    assert counted.take(model.first.weight) == 2 * MICRO_BATCHES


def test_evaluation_neither_keeps_nor_uses_it() -> None:
    model = Experts()
    report = convert(model, "fp8-delayed", {"*": "fp8-delayed"}, fp8_eval=True)
    report.precision_map.scale_history.share_weight_casts = True
    train(model, report.precision_map, steps=2)
    model.eval()
    model(torch.randn(4, 48), 0)
    assert model.first.memory.weight_cast is None


def test_compiled_code_casts_by_itself() -> None:
    model = Experts()
    table = converted(model, share=True)
    train(model, table, steps=2)
    model.compile(backend="aot_eager", fullgraph=True)
    model(torch.randn(16, 48), 0).sum().backward()
    assert model.first.memory.weight_cast is None


def test_a_sharded_weight_is_not_kept() -> None:
    """Between steps FSDP2's weights are DTensors, FSDP1's slices of one dimension."""
    model = Experts()
    table = converted(model, share=True)
    weight = model.first.weight
    model.first.weight = nn.Parameter(weight.detach().flatten()[:100])
    table.scale_history.step()
    model.first.weight = weight
    model(torch.randn(16, 48), 0)
    assert model.first.memory.weight_cast is None
    assert model.second.memory.weight_cast is not None
