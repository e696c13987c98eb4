"""A plain loop makes the Trainer's steps, bit for bit, and leaves its records."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp import ClampMonitor, FP8Precision, FP16Precision, LossScaling, ParityProbe
from lightning_fp.layers.stored import is_stored
from lightning_fp.loop import PrecisionLoop
from lightning_fp.recipes import Gate, RolloutRecipe, Stage
from lightning_fp.records import read_loss, read_parity, read_statistics
from tests.helper import LanguageModel, TinyGPT, fit, next_byte_loss, text_loader, text_rows

STEPS = 6


class Scheduled(LanguageModel):
    """A scheduler that counts steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def plain(
    scaling: Any = "delayed", *, accumulate: int = 1, steps: int = STEPS, **options: Any
) -> tuple[PrecisionLoop, list[Tensor]]:
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    loop = PrecisionLoop(model, optimizer, scaling, scheduler=scheduler, **options)
    batches = iter(text_loader())
    losses: list[Tensor] = []
    for _ in range(steps):
        micro = [next(batches) for _ in range(accumulate)]
        losses.append(loop.step(lambda b: next_byte_loss(model, b), micro))
    return loop, losses


def same(model: nn.Module, loop: PrecisionLoop) -> bool:
    ours = loop.model.state_dict()
    theirs = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    ("scaling", "base"),
    [
        ("delayed", "bf16-mixed"),
        ("dynamic", "bf16-true"),
        ("rowwise", "32-true"),
        ("delayed", "16-mixed"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_weights_are_the_trainers(scaling: Any, base: Any, accumulate: int) -> None:
    trained = fit(
        FP8Precision(scaling, base=base),
        Scheduled(),
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    )
    loop, losses = plain(scaling, base=base, accumulate=accumulate, clip_norm=0.5)
    assert same(trained, loop)
    assert loop.global_step == STEPS
    means = torch.tensor(trained.losses).view(STEPS, accumulate).mean(1)
    assert torch.allclose(torch.stack(losses), means, rtol=1e-6)


@pytest.mark.parametrize("base", ["16-mixed", "16-true"])
def test_fp16_skips_the_trainers_steps(base: Any) -> None:
    scaling = LossScaling(init_scale=2.0**24, growth_interval=3)
    plugin = FP16Precision(base, loss_scaling=scaling)
    trained = fit(plugin, Scheduled(), max_steps=16)
    loop, losses = plain("fp16", base=base, loss_scaling=scaling, steps=16)
    assert same(trained, loop)
    assert plugin.scaler is not None
    assert loop.loss_scale == float(plugin.scaler.state.scale) != 2.0**24
    assert loop.scheduler is not None
    made = plugin.scaler.state.numbers()["made"]
    assert 0 < made < 16
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.8**made)
    assert all(loss.isfinite() for loss in losses)


def test_a_step_that_is_not_finite_is_left_out_and_the_scheduler_waits() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loop = PrecisionLoop(model, optimizer, scheduler=scheduler)
    for step, batch in enumerate(text_rows(40).split(8)):
        before = {name: x.clone() for name, x in model.state_dict().items()}
        factor = math.nan if step == 2 else 1.0
        loop.step(lambda b, factor=factor: factor * next_byte_loss(model, b), batch)
        moved = any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert moved == (step != 2)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_a_block_in_place_of_a_function_makes_the_same_step() -> None:
    loop, losses = plain()
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    other = PrecisionLoop(model, optimizer, "delayed", scheduler=scheduler)
    for batch, expected in zip(text_loader(), losses, strict=False):
        with other.training_step(batch):
            loss = next_byte_loss(model, batch)
            other.backward(loss)
        assert torch.equal(loss.detach(), expected)
    assert all(map(torch.equal, model.state_dict().values(), loop.model.state_dict().values()))


FORMATS = ["dynamic", "delayed", "rowwise", "rowwise-gw-hp", "block", "mx", "e8m3", "bf16", "auto"]


@pytest.mark.parametrize("scaling", FORMATS)
@pytest.mark.parametrize("base", ["bf16-mixed", "32-true"])
def test_as_trained_is_the_coming_training_forward_bit_for_bit(scaling: Any, base: Any) -> None:
    torch.manual_seed(0)
    model = TinyGPT(dropout=0.3)
    loop = PrecisionLoop(model, torch.optim.AdamW(model.parameters(), lr=1e-2), scaling, base=base)
    for batch in text_rows(24).split(8):
        before = loop.precision_map.state_dict()
        with loop.as_trained(), torch.no_grad():
            old = model(batch[:, :-1])
            assert not model.training
        after = loop.precision_map.state_dict()
        assert str(before) == str(after)
        assert model.training
        seen: list[Tensor] = []

        def loss_of(b: Tensor, seen: list[Tensor] = seen) -> Tensor:
            for block in model.blocks:
                block.dropout = 0.0
            logits = model(b[:, :-1])
            for block in model.blocks:
                block.dropout = 0.3
            seen.append(logits.detach())
            return logits.float().square().mean()

        loop.step(loss_of, batch)
        assert torch.equal(old, seen[0])
        with loop.evaluation():
            high = model(batch[:, :-1])
        assert not high.requires_grad


def test_records_are_those_of_a_trainer(tmp_path: Path) -> None:
    monitor = ClampMonitor(every_n_steps=2, log_every_n_steps=3, dirpath=tmp_path / "trainer")
    fit(FP8Precision("delayed"), Scheduled(), max_steps=STEPS, callbacks=[monitor])
    shown: list[tuple[int, set[str]]] = []
    loop, _ = plain(
        monitor={"every_n_steps": 2, "log_every_n_steps": 3},
        dirpath=tmp_path / "plain",
        logger=lambda values, step: shown.append((step, set(values))),
    )
    loop.close()
    theirs, ours = (read_statistics(tmp_path / name) for name in ("trainer", "plain"))
    assert ours.num_rows == theirs.num_rows > 0
    for name in ("step", "operand", "format", "amax", "clamped_mass", "sqnr_db"):
        assert str(ours[name].to_pylist()) == str(theirs[name].to_pylist())
    assert [step for step, _ in shown] == [3, 6]
    assert "fp8/share" in shown[0][1]
    theirs, ours = (read_loss(tmp_path / name) for name in ("trainer", "plain"))
    assert torch.equal(ours.steps, theirs.steps)
    assert torch.equal(ours.values, theirs.values)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, _ = plain(base="16-mixed", dirpath=tmp_path / "whole")
    first, _ = plain(base="16-mixed", dirpath=tmp_path / "parts", steps=3)
    state: dict[str, Any] = {
        "loop": first.state_dict(),
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "scheduler": first.scheduler.state_dict() if first.scheduler else None,
    }
    first.close()
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = TinyGPT()
    model.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(state["optimizer"])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    scheduler.load_state_dict(state["scheduler"])
    second = PrecisionLoop(
        model,
        optimizer,
        "delayed",
        base="16-mixed",
        scheduler=scheduler,
        dirpath=tmp_path / "parts",
    )
    second.load_state_dict(state["loop"])
    for batch in list(text_loader())[3:STEPS]:
        second.step(lambda b: next_byte_loss(model, b), batch)
    assert all(map(torch.equal, model.state_dict().values(), whole.model.state_dict().values()))
    assert str(second.state_dict()["precision"]) == str(whole.state_dict()["precision"])
    assert second.directory == tmp_path / "parts"
    for loop in (whole, second):
        loop.close()
    assert torch.equal(read_loss(tmp_path / "parts").values, read_loss(tmp_path / "whole").values)


def test_what_cannot_be_is_refused() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, words in (
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"monitor": {"sometimes": 1}}, "monitor must be a bool or its options"),
        ({"base": "16-true"}, "base must not be '16-true' with FP8 layers"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}, "asks for a metric"),
        ({"layers": {"*nothing": "bf16"}}, "matches no linear layer"),
    ):
        with pytest.raises(ValueError, match=words):
            PrecisionLoop(model, optimizer, **options)
    loop = PrecisionLoop(model, optimizer)
    with pytest.raises(ValueError, match="empty list"):
        loop.step(lambda _: torch.zeros(()), [])
    with pytest.raises(ValueError, match="must return a scalar tensor, got shape"):
        loop.step(lambda b: model(b), text_rows(4)[:, :-1])
    with pytest.raises(ValueError, match="requires none"):
        loop.step(lambda b: model(b).mean().detach(), text_rows(4)[:, :-1])
    with pytest.raises(ValueError, match="must be called within"):
        loop.backward(torch.zeros((), requires_grad=True))
    with pytest.raises(ValueError, match="needs a backward"), loop.training_step():
        pass
    with pytest.raises(ValueError, match="before the first step"):
        loop.load_state_dict(loop.state_dict())
    loop.close()
    with pytest.raises(ValueError, match="closed"):
        loop.step(lambda b: next_byte_loss(model, b), text_rows(4))


def test_shares_are_measured_where_there_is_an_example() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    example = text_rows(4)[:, :-1]
    loop = PrecisionLoop(model, optimizer, base="32-true", example_input=example)
    assert loop.conversion is not None
    assert loop.conversion.measured
    assert 0.5 < loop.conversion.flops_share < 1


class WithoutClosure(torch.optim.Optimizer):
    """As research code has it: `step` takes nothing."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def two_groups(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    matrices = [p for name, p in model.named_parameters() if "fc" in name and p.ndim == 2]
    known = set(map(id, matrices))
    return matrices, [p for p in model.parameters() if id(p) not in known]


def test_several_optimizers_step_as_one() -> None:
    def trained(kind: str) -> tuple[TinyGPT, PrecisionLoop]:
        torch.manual_seed(0)
        model = TinyGPT()
        matrices, rest = two_groups(model)
        groups = [{"params": matrices, "lr": 1e-2}, {"params": rest, "lr": 1e-3}]
        optimizers: Any = torch.optim.AdamW(groups)
        if kind == "several":
            optimizers = [torch.optim.AdamW(g["params"], lr=g["lr"]) for g in groups]
        schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(each, 0.5)
            for each in (optimizers if kind == "several" else [optimizers])
        ]
        loop = PrecisionLoop(
            model, optimizers, "delayed", scheduler=schedulers, clip_norm=0.5, base="16-mixed"
        )
        for index, batch in enumerate(text_rows(48).split(8)):

            def loss_of(b: Tensor, bad: bool = index == 3) -> Tensor:
                return next_byte_loss(model, b) * (torch.nan if bad else 1)

            loop.step(loss_of, batch)
        return model, loop

    (one, single), (other, several) = trained("one"), trained("several")
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert several.steps.skipped == single.steps.skipped == 1
    assert several.global_step == 6
    rates = [each.param_groups[0]["lr"] for each in several.optimizers]
    assert rates == pytest.approx([1e-2 * 0.5**5, 1e-3 * 0.5**5])


def test_an_optimizer_whose_step_takes_no_closure() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    matrices, rest = two_groups(model)
    optimizers = [WithoutClosure(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]
    loop = PrecisionLoop(model, optimizers, "dynamic", fallback={"snapshot_every_n_steps": 2})
    losses = [
        float(loop.step(lambda b: next_byte_loss(model, b), batch))
        for batch in text_rows(96).split(8)
    ]
    assert losses[-1] < losses[0] - 0.2
    assert loop.steps.sentence()
    loop.close()
    alone = PrecisionLoop(model, WithoutClosure(model.parameters(), lr=1e-3), "bf16")
    alone.step(lambda b: next_byte_loss(model, b), text_rows(8))


def test_optimizers_that_cannot_step_together_are_refused() -> None:
    model = TinyGPT()
    matrices, rest = two_groups(model)
    adam = torch.optim.AdamW(rest, lr=1e-3)
    lbfgs: Any = torch.optim.LBFGS(matrices)
    for optimizers, words in (
        ([adam, lbfgs], "must not have LBFGS among several"),
        ([adam, torch.optim.SGD(model.parameters(), lr=0.1)], "of different Parameters"),
        ([adam, "sgd"], "optimizer must be an Optimizer or a list of Opt"),
        ([], "got none"),
    ):
        with pytest.raises(ValueError, match=words):
            PrecisionLoop(model, optimizers)


def test_parity_is_the_trainers_and_changes_nothing(tmp_path: Path) -> None:
    probe = ParityProbe(every_n_steps=2, worst=1, seed=None, dirpath=tmp_path / "trainer")
    trained = fit(FP8Precision("delayed"), Scheduled(), max_steps=STEPS, callbacks=[probe])
    options = {"every_n_steps": 2, "worst": 1, "seed": None}
    loop, _ = plain(parity=options, dirpath=tmp_path / "plain")
    assert same(trained, loop)
    assert list(loop.parity) == list(probe.results) == [0, 2, 4]
    for step, found in loop.parity.items():
        other = probe.results[step]
        assert (found.loss, found.grad_error) == (other.loss, other.grad_error)
        assert found.grad_error > found.noise == 0
    loop.close()
    assert read_parity(tmp_path / "plain").num_rows == read_parity(tmp_path / "trainer").num_rows


def test_parity_that_cannot_be_is_refused() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parity must be False for FP16"):
        PrecisionLoop(model, optimizer, "fp16", base="16-mixed", parity=True)
    loop = PrecisionLoop(TinyGPT(), optimizer, parity=True)
    with (
        pytest.raises(ValueError, match="parity must be False where steps are made in blocks"),
        loop.training_step(),
    ):
        pass
    gate = Gate(statistic="parity/grad_cosine", above=0.9, window=8)
    stages = (
        Stage(name="high", layers={"*": "high"}, until={"steps": 1}, gates=(gate,)),
        Stage(name="low", layers={"*": "configured"}),
    )
    recipe = RolloutRecipe(name="gated", stages=stages)
    for parity, words in ((False, "needs parity=True"), (True, "window must be at least 500")):
        with pytest.raises(ValueError, match=words):
            PrecisionLoop(TinyGPT(), optimizer, recipe=recipe, parity=parity)


def test_frozen_weights_are_stored() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc" not in name)
    with pytest.raises(ValueError, match="where the optimizer has frozen Parameters"):
        PrecisionLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), frozen="stored")
    trained = [p for p in model.parameters() if p.requires_grad]
    loop = PrecisionLoop(model, torch.optim.SGD(trained, lr=0.1), frozen="stored")
    assert any(map(is_stored, loop.precision_map.layers.values()))
    losses = [
        float(loop.step(lambda b: next_byte_loss(model, b), batch))
        for batch in text_rows(32).split(8)
    ]
    assert losses[-1] < losses[0]


def test_weights_are_cast_from_their_bf16_export() -> None:
    """The keyword is the format's name, for rules too."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    other = copy.deepcopy(one)
    keyword = PrecisionLoop(
        one,
        torch.optim.SGD(one.parameters(), lr=0.1),
        "block",
        layers={"1": "fp8-dynamic"},
        quantise_like="bf16-export",
    )
    names = {"0": "fp8-block", "1": "fp8-dynamic"}
    matched = {layer: f"{name}[quantise_like=bf16-export]" for layer, name in names.items()}
    name = PrecisionLoop(other, torch.optim.SGD(other.parameters(), lr=0.1), layers=matched)
    assert keyword.precision_map.formats() == name.precision_map.formats() == matched
    batch = torch.randn(4, 32)
    for loop, model in ((keyword, one), (name, other)):
        loop.step(lambda x, model=model: model(x).square().mean(), batch)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
