"""Options and hooks of Lightning: what means "off", what a batch goes through, what a step sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fp import (
    ClampMonitor,
    DivergenceDetector,
    FP8Precision,
    FP16Precision,
    LossScaling,
    PrecisionFallback,
)
from tests.cases.programs import PLAIN, Program, error, fit, high, made, rows, weights

OFF: list[dict[str, Any]] = [
    {"log_every_n_steps": 0},
    {"barebones": True},
    {"fast_dev_run": True},
    {"limit_train_batches": 0},
    {"max_epochs": 0},
    {"num_sanity_val_steps": 0, "limit_val_batches": 0},
    {"gradient_clip_val": 0},
    {"max_steps": 0},
    {"max_time": "00:00:00:00"},
    {"overfit_batches": 1},
]


@pytest.mark.compatibility(
    "loops", "options that mean off (`log_every_n_steps=0`, `barebones`)", "works"
)
@pytest.mark.parametrize("option", OFF, ids=[next(iter(option)) for option in OFF])
def test_an_option_that_means_off_is_off(tmp_path: Path, option: dict[str, Any]) -> None:
    plain = made(Program)
    steps = fit(plain, PLAIN, tmp_path, **option).global_step
    for plugin in (high(), FP8Precision("delayed"), FP16Precision()):
        ours = made(Program)
        watch = [] if "barebones" in option else [PrecisionFallback()]
        watch += [ClampMonitor()] if watch and isinstance(plugin, FP8Precision) else []
        assert fit(ours, plugin, tmp_path, *watch, **option).global_step == steps
        assert error(weights(ours), weights(plain)) < 0.05


SEEN: list[tuple[bool, int, int, float]] = []
"""Whether in a replay, which batch, `global_step`, its mean; replays put attributes back."""


class Seen(Program):
    """Normalises on the device, anneals by `global_step`, and notes what each step got."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return (batch - 50) / 5

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        replayed = self.trainer.precision_plugin.precision_map.frozen
        SEEN.append((replayed, batch_idx, self.global_step, batch.mean().item()))
        return self.loss(batch) * (1 + self.global_step / 100)


@pytest.mark.compatibility(
    "loops", "`on_after_batch_transfer`, annealing by `global_step`", "works"
)
def test_a_replay_takes_the_whole_way_of_its_batch_and_its_counters(tmp_path: Path) -> None:
    SEEN.clear()
    data = DataLoader(rows(8 * 20) * 5 + 50, batch_size=8)
    fallback = PrecisionFallback(detector=DivergenceDetector(armed=16), probe_every_n_steps=6)
    fit(made(Seen), FP8Precision("dynamic"), tmp_path, fallback, data=data)
    trained = {batch: (step, mean) for again, batch, step, mean in SEEN if not again}
    replayed = [(batch, (step, mean)) for again, batch, step, mean in SEEN if again]
    assert len(trained) == 20
    assert replayed
    assert all(trained[batch] == what for batch, what in replayed)


class Scheduled(Program):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not self.trainer.precision_plugin.precision_map.frozen:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [66, 69], 0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.slow
@pytest.mark.compatibility("loops", "learning rate schedules, an acquittal at a milestone", "works")
def test_an_acquittal_leaves_the_schedule_as_it_was(tmp_path: Path) -> None:
    data = rows(8 * 90)
    data[8 * 64 : 8 * 70] *= 12  # a fault of the data
    rates: list[list[float]] = []
    for callbacks in (
        [],
        [PrecisionFallback(detector=DivergenceDetector(armed=32), probe_every_n_steps=None)],
    ):
        module = made(Scheduled, rates=[])
        fit(
            module,
            FP8Precision("dynamic"),
            tmp_path,
            *callbacks,
            data=DataLoader(data, batch_size=8),
        )
        rates.append(module.rates)
    events = [
        json.loads(line)
        for f in tmp_path.rglob("events.jsonl")
        for line in f.read_text().splitlines()
    ]
    assert any(event["kind"] == "suspect" for event in events)
    assert rates[0] == rates[1]


class TakesItself(Program):
    """Takes its batches out of the loader by itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.compatibility(
    "loops",
    "`training_step(dataloader_iter)`",
    "works with a note",
    "watched by limits and the guard; nothing can be replayed; an event says so",
)
@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_takes_its_batches_itself_is_watched_without_replays(tmp_path: Path) -> None:
    plain, ours = made(TakesItself), made(TakesItself)
    fit(plain, PLAIN, tmp_path)
    fit(ours, high(), tmp_path, PrecisionFallback())
    assert torch.equal(weights(ours), weights(plain))
    low = made(TakesItself)
    trainer = fit(low, FP8Precision("delayed"), tmp_path, PrecisionFallback())
    assert trainer.global_step == 4
    assert "nothing can be replayed" in "".join(
        file.read_text() for file in tmp_path.rglob("events.jsonl")
    )


class Own(Program):
    """Steps without the closure: Lightning says that this skips the training step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *_: Any) -> None:
        optimizer.step()


@pytest.mark.compatibility(
    "loops", "an `optimizer_step` of one's own that forgets the closure", "refused"
)
@pytest.mark.parametrize("watched", [False, True])
def test_a_closure_that_is_never_called_is_lightnings_error(tmp_path: Path, watched: bool) -> None:
    with pytest.raises(Exception, match="closure") as plain:
        fit(made(Own), PLAIN, tmp_path)
    watch = [PrecisionFallback()] if watched else []
    with pytest.raises(type(plain.value), match="closure"):
        fit(made(Own), high(), tmp_path, *watch)


class Hand(Program):
    """Manual optimization with accumulation by hand; counts what its optimizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.compatibility("loops", "manual optimization, clipping, accumulation by hand", "works")
def test_manual_optimization_makes_the_steps_that_plain_lightning_makes(tmp_path: Path) -> None:
    plain = made(Hand)
    steps = fit(plain, PLAIN, tmp_path).global_step
    for plugin in (high(), FP8Precision("delayed"), FP16Precision()):
        ours = made(Hand)
        assert fit(ours, plugin, tmp_path, PrecisionFallback()).global_step == steps == 2
        assert error(weights(ours), weights(plain)) < 0.02


class Strange:
    """An attribute that answers to everything, as mocks and proxies do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def test_attributes_that_answer_to_everything_are_left_alone(tmp_path: Path) -> None:
    plain, ours = made(Program), made(Program, strange=Strange())
    fit(plain, PLAIN, tmp_path)
    fit(ours, high(), tmp_path, PrecisionFallback())
    assert torch.equal(weights(ours), weights(plain))


class Penalised(Program):
    """A gradient penalty and nothing else: all of each gradient is a backward through a backward.

    Beside each step the same in float64, with the weights of that step, by plain layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[float] = []

    def penalty(self, batch: Tensor) -> Tensor:
        x = batch.clone().requires_grad_()
        [slope] = torch.autograd.grad(self.head(self.body(x)).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batch = batch
        return self.penalty(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        exact = Penalised()
        exact.load_state_dict(self.state_dict())
        with torch.autocast("cpu", enabled=False):
            exact.double().penalty(self.batch.double()).backward()
        for ours, plain in zip(self.parameters(), exact.parameters(), strict=True):
            if plain.grad is None or not plain.grad.any():
                assert ours.grad is None or not ours.grad.any()
            else:
                assert ours.grad is not None
                self.errors.append(error(ours.grad, plain.grad))


@pytest.mark.compatibility("loops", "gradient penalties and Hessian-vector products", "works")
@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        (None, 0.02),
        ("bf16", 0.02),
        ("fp32", 1e-5),
        ("dynamic", 0.2),
        ("delayed", 0.2),
        ("rowwise", 0.1),
        ("block", 0.1),
        ("mx", 0.1),
    ],
)
def test_a_gradient_penalty_trains(tmp_path: Path, scaling: Any, most: float) -> None:
    """No Parameter's gradient, in no step, lacks a term: that would be an error of the whole."""
    ours = made(Penalised)
    fit(ours, PLAIN if scaling is None else FP8Precision(scaling), tmp_path)
    assert len(ours.errors) == 4 * 4
    assert max(ours.errors) < most


class Explicit(Program):
    """Gradients by torch.autograd.grad, the larger ones inside of the loss: meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        hidden = self.body(batch)
        inner = hidden.float().square().sum()
        [slope] = torch.autograd.grad(inner, self.body[0].weight, create_graph=True)
        parameters = list(self.body.parameters())
        gradients = torch.autograd.grad(1e-4 * slope.square().sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizers().step()


@pytest.mark.compatibility("loops", "gradients by `torch.autograd.grad` alone", "works")
@pytest.mark.parametrize("scaling", ["high", "dynamic", "delayed", "rowwise"])
def test_gradients_that_reach_no_parameter_are_scaled_as_others(
    tmp_path: Path, scaling: Any
) -> None:
    start, plain, ours = made(Explicit), made(Explicit), made(Explicit)
    fit(plain, PLAIN, tmp_path)
    fit(ours, FP8Precision(scaling), tmp_path)
    way = weights(plain) - weights(start)
    assert error(weights(ours) - weights(start), way) < (0.3 if scaling != "high" else 1e-9)


class Curved(Program):
    """Multiplies by the Hessian in a step, as second-order optimizers do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch), create_graph=True)
        slopes = [p.grad for p in self.parameters()]
        products = torch.autograd.grad(slopes, [*self.parameters()], [g.sign() for g in slopes])
        self.products = torch.cat([each.detach().float().flatten() for each in products])
        self.trainer.strategy.precision_plugin.clip_gradients(self.optimizers(), 1e9)
        self.slopes = torch.cat([p.grad.detach().flatten() for p in self.parameters()])
        self.zero_grad()


@pytest.mark.compatibility(
    "loops",
    "Hessian-vector products of gradients under an FP16 loss scale",
    "works with a note",
    "they grow by the scale, in plain nn.Linear too, so a scale that moves is held at 128",
)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize(
    "scaling", ["bf16", "dynamic", "delayed", "rowwise", "mx", "fp16", "fp16 held"]
)
def test_products_with_the_hessian_are_those_of_the_plain_model(
    tmp_path: Path, scaling: Any
) -> None:
    plain, ours = made(Curved), made(Curved)
    fit(plain, "32-true", tmp_path)
    scale = 128.0 if "fp16" in scaling else 1.0
    if scaling == "fp16":
        plugin = FP16Precision(loss_scaling=LossScaling.static(scale))
    else:
        plugin = FP16Precision() if "fp16" in scaling else FP8Precision(scaling, base="32-true")
    if scaling == "fp16 held":
        with pytest.warns(UserWarning, match="loss scale of 65536: .* it is held at 128, where"):
            fit(ours, plugin, tmp_path)
    else:
        fit(ours, plugin, tmp_path)
    assert error(ours.products / scale, plain.products) < 0.15
    assert error(ours.slopes, plain.slopes) < 0.15


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_derivatives_of_gradients_under_a_large_loss_scale_are_warned_of(tmp_path: Path) -> None:
    plugin = FP16Precision(loss_scaling=LossScaling.static(65536))
    with pytest.warns(UserWarning, match=r"loss scale of 65536: derivatives.*static\(128\)"):
        fit(made(Curved), plugin, tmp_path, limit_train_batches=1)


class StepsInBackward(Program):
    """Steps as each gradient arrives, so that no two are in memory at a time."""

    returned = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), 1e-3) if self.returned else None

    def on_train_start(self) -> None:
        def step(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=1e-3)
            parameter.grad = None

        for parameter in self.body.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))


@pytest.mark.compatibility(
    "loops",
    "optimizers that step in hooks of gradients",
    "works with a note",
    "they see the loss scale: FP16 refuses a run that has no others, and warns otherwise",
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("returned", [True, False])
def test_optimizers_that_step_in_backward(tmp_path: Path, returned: bool) -> None:
    plain, ours = (made(StepsInBackward, returned=returned) for _ in range(2))
    fit(plain, "32-true", tmp_path)
    fit(ours, FP8Precision("high", base="32-true"), tmp_path)
    assert torch.equal(weights(ours), weights(plain))
    half = made(StepsInBackward, returned=returned)
    if returned:
        with pytest.warns(UserWarning, match=r"as body.0.weight has, see gradients with the FP16"):
            fit(half, FP16Precision(), tmp_path, limit_train_batches=1)
    else:
        with pytest.raises(ValueError, match="must return an optimizer with FP16, got none"):
            fit(half, FP16Precision(), tmp_path)


class Elsewhere(L.Callback):
    """A later Trainer of another precision is to have its own."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.exact = torch.equal(
            module.body[0](module.example),
            torch.nn.functional.linear(module.example, module.body[0].weight, module.body[0].bias),
        )


class Clipped(Program):
    """Writes to weights between the micro-batches of a step, in a way that no version shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        layer = self.body[0]
        exact = torch.nn.functional.linear(batch, layer.weight.float(), layer.bias.float())
        self.seen.append(error(layer(batch).detach(), exact.detach()))
        return self.loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.body[0].weight.data.mul_(0.5)


@pytest.mark.compatibility(
    "loops",
    "writes through `.data` between the micro-batches of one step, delayed scaling",
    "works with a note",
    "eager mode casts a weight once a step, and sees them from the next on; write under `no_grad`",
)
def test_writes_between_micro_batches_are_seen_where_a_version_shows_them(tmp_path: Path) -> None:
    seen = {}
    for scaling, accumulated in (("dynamic", 4), ("delayed", 1), ("delayed", 4)):
        module = made(Clipped)
        fit(
            module,
            FP8Precision(scaling),
            tmp_path,
            accumulate_grad_batches=accumulated,
            max_epochs=2,
        )
        seen[scaling, accumulated] = module.seen
    late = seen.pop(("delayed", 4))
    assert all(max(errors) < 0.08 for errors in seen.values())
    assert late[4] < 0.08 < late[5]  # the first of a step, and the second
    ours = made(Clipped)
    ours.on_train_batch_end = lambda *_: torch.no_grad()(ours.body[0].weight.mul_)(0.5)
    fit(ours, FP8Precision("delayed"), tmp_path, accumulate_grad_batches=4, max_epochs=2)
    assert max(ours.seen) < 0.08


@pytest.mark.compatibility("loops", "the same model in a later Trainer without a plugin", "works")
def test_a_later_trainer_of_another_precision_trains_in_its_own(tmp_path: Path) -> None:
    module = made(Program, example=rows(4))
    fit(module, FP8Precision("delayed"), tmp_path)
    look = Elsewhere()
    fit(module, "32-true", tmp_path, look)
    assert look.exact
