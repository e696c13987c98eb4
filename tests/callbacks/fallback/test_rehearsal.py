"""The rehearsal: it passes on ordinary loops, and names what a step does besides."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import peft
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.events import Rehearsed, Verdict
from lightning_fp.plugins import LayerPrecision
from lightning_fp.records import read_events
from lightning_fp.stability.happenings import Asked
from lightning_fp.stability.replay.rehearsal import NOTHING_ELSE
from tests.helper import make_trainer, same_weights, supervisor_of

WIDTH = 8
STEPS = 8


class Net(L.LightningModule):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, 1)
        self.told: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x).tanh()) - x.mean(dim=1, keepdim=True)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(outputs, dict) and outputs:
            self.told.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-2)


def rows(batch_size: int = 4, **options: Any) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(0)
    data: Any = torch.randn(4 * 4 * STEPS, WIDTH, generator=generator)
    return DataLoader(data, batch_size=batch_size, **options)


def fp8() -> LayerPrecision:
    return FP8Precision("dynamic", base="32-true", layers={"*": "fp8-dynamic"})


def train(
    model: L.LightningModule,
    fallback: PrecisionFallback,
    callbacks: list[L.Callback] | None = None,
    loader: Any = None,
    plugin: LayerPrecision | None = None,
    **options: Any,
) -> L.Trainer:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(1)
    trainer = make_trainer(
        fp8() if plugin is None else plugin,
        **{"max_steps": STEPS, "callbacks": [*(callbacks or []), fallback], **options},
    )
    trainer.fit(model, rows() if loader is None else loader)
    return trainer


def rehearsed(
    model: L.LightningModule,
    directory: Path,
    callbacks: list[L.Callback] | None = None,
    **more: Any,
) -> Rehearsed:
    """What the rehearsal of a run has told."""
    train(model, PrecisionFallback(dirpath=directory), callbacks, **more)
    [event] = read_events(directory, kinds=["rehearsal"])
    assert isinstance(event, Rehearsed)
    return event


# -- ordinary loops ------------------------------------------------------------------------------


class Llama(L.LightningModule):
    """A tiny one of Hugging Face's, perhaps with adapters."""

    def __init__(self, lora: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
        model: Any = LlamaForCausalLM(config)
        if lora:
            targets = ["q_proj", "v_proj"]
            settings = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=targets)
            model = peft.get_peft_model(model, settings)
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("perplexity", loss.exp(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW(trained, lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def tokens() -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(0)
    data: Any = torch.randint(32, (4 * STEPS, 8), generator=generator)
    return DataLoader(data, batch_size=4)


class Gan(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        made = self.generator(torch.randn_like(batch))
        losses = {
            critic: lambda: self.loss(batch) - self.loss(made.detach()).clamp(max=1),
            generator: lambda: self.loss(made),
        }
        for optimizer, loss in losses.items():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log_dict({"critic": 1.0, "generator": 2.0})

    def configure_optimizers(self) -> Any:
        own = [*self.body.parameters(), *self.head.parameters()]
        return [AdamW(own, lr=1e-3), AdamW(self.generator.parameters(), lr=1e-3)]


class Cnn(Net):
    """With batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
        self.last = nn.Linear(4 * WIDTH, 1)

    def loss(self, x: Tensor) -> Tensor:
        seen = self.last(self.features(x[:, None]).flatten(1))
        return (seen - x.mean(dim=1, keepdim=True)).square().mean()


class Metrics(Net):
    """Keeps metrics, some of which it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()
        self.all = torchmetrics.MetricCollection({"mean": torchmetrics.MeanMetric()})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.error(loss.detach(), torch.zeros(()))
        self.all(loss.detach())
        self.log("error", self.error, on_step=True, on_epoch=True)
        return loss


class Sam(Optimizer):
    """Sharpness-aware: calls its closure twice."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            loss = closure()
        moved = [0.05 * p.grad for p in parameters]
        with torch.no_grad():
            for parameter, by in zip(parameters, moved, strict=True):
                parameter.add_(by)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for parameter, by in zip(parameters, moved, strict=True):
                parameter.sub_(by).sub_(0.05 * parameter.grad)
        return loss


class WithSam(Net):
    def configure_optimizers(self) -> Any:
        return Sam(self.parameters())


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.5, self.training)


class Compiled(Net):
    """With dropout, whose random numbers compiled code draws otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Dropping()
        self.body.compile()


Ordinary = Callable[[], tuple[L.LightningModule, dict[str, Any]]]

ORDINARY: dict[str, Ordinary] = {
    "Hugging Face Llama": lambda: (Llama(), {"loader": tokens()}),
    "LoRA": lambda: (Llama(lora=True), {"loader": tokens()}),
    "GAN": lambda: (Gan(), {"max_steps": 2 * STEPS}),
    "BatchNorm CNN": lambda: (Cnn(), {"gradient_clip_val": 0.5}),
    "WeightAveraging": lambda: (Net(), {"callbacks": [WeightAveraging(use_buffers=True)]}),
    "torchmetrics": lambda: (Metrics(), {}),
    "accumulation": lambda: (Net(), {"accumulate_grad_batches": 2}),
    "SAM": lambda: (WithSam(), {}),
    "StatefulDataLoader": lambda: (
        Net(),
        {"loader": StatefulDataLoader(rows().dataset, batch_size=4, shuffle=True)},
    ),
    "delayed scaling": lambda: (
        Net(),
        {"plugin": FP8Precision("delayed", layers={"*": "fp8-delayed"})},
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("loop", [*ORDINARY])
def test_it_passes_on_an_ordinary_loop_and_leaves_it_as_it_was(loop: str, tmp_path: Path) -> None:
    model, options = ORDINARY[loop]()
    event = rehearsed(model, tmp_path / "with", **options)
    assert (event.outcome, event.differs) == ("passed", ())
    assert event.numbers["replayed"] == 13
    assert event.numbers["noise"] == 0
    without, options = ORDINARY[loop]()
    train(without, PrecisionFallback(dirpath=tmp_path / "without", rehearse=False), **options)
    assert same_weights(model, without)
    assert getattr(model, "told", None) == getattr(without, "told", None)


@pytest.mark.slow
def test_it_passes_on_compiled_code_with_dropout(tmp_path: Path) -> None:
    event = rehearsed(Compiled(), tmp_path)
    assert event.outcome == "passed"
    assert "eager code cannot be compared" in event.reason


@pytest.mark.parametrize(("scaling", "graphs"), [("fp8-dynamic", 1), ("fp8-delayed", 2)])
def test_the_control_runs_code_as_it_was_compiled(
    scaling: str, graphs: int, tmp_path: Path
) -> None:
    """Layers record in every step of the run: code compiled for that has to serve a replay too."""
    model, in_replays = Net(), list[bool]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def counted(*args: Tensor) -> Any:
            in_replays.append(model.trainer.precision_plugin.precision_map.frozen)
            return graph(*args)

        return counted

    model.body.compile(backend=backend)
    plugin = FP8Precision(scaling, base="32-true", layers={"*": scaling})
    event = rehearsed(model, tmp_path, plugin=plugin)
    assert event.outcome == "passed"
    assert event.numbers["recorded_loss"] == event.numbers["replayed_loss"]
    assert in_replays.count(False) == STEPS
    assert any(in_replays)
    # The run's alone; under delayed scaling the first step, without scales, has another.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


# -- side effects --------------------------------------------------------------------------------


class Meter:
    """An object of a user's own."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: Tensor) -> None:
        self.total, self.count = self.total + float(value.detach()), self.count + 1


class OwnObject(Net):
    """training_step of OwnObject changes self.meter.total, self.meter.count"""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.meter.add(loss)
        return loss


class ObjectOfCallback(L.Callback):
    """on_train_batch_start of ObjectOfCallback changes self.meter.total, self.meter.count"""

    def __init__(self) -> None:
        self.meter = Meter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.meter.add(torch.ones(()))


RUNS: dict[str, Any] = {"steps": 0, "seen": []}


class Global(Net):
    """training_step of Global changes the global of tests.callbacks.fallback.test_rehearsal RUNS"""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        RUNS["steps"] += 1
        return self.loss(batch)


BANK: list[float] = []


class GlobalBank(Net):
    """training_step gives another loss the second time"""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        BANK.append(loss.item())
        return loss + 0.1 * sum(BANK)


SEEN: dict[str, list[float]] = {"train": []}


class Logs(Net):
    """training_step of Logs changes the global of tests.callbacks.fallback.test_rehearsal SEEN"""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        SEEN["train"].append(loss.item())
        return loss


class OfClass(Net):
    """training_step of OfClass changes calls"""

    calls: ClassVar[int] = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        type(self).calls += 1
        return self.loss(batch)


class Deep(L.Callback):
    """on_after_backward of Deep changes self.tree['a']['b']['c']['d']"""

    def __init__(self) -> None:
        self.tree: Any = {"a": {"b": {"c": {"d": [0, torch.zeros(1)]}}}}

    def on_after_backward(self, *_: Any) -> None:
        self.tree["a"]["b"]["c"]["d"].append(1)


class GroupEntry(Net):
    """on_train_batch_start of GroupEntry changes history of parameter group 0 of AdamW"""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.trainer.optimizers[0].param_groups[0].setdefault("history", []).append(batch_idx)


class Momentum(Net):
    """on_after_backward of Momentum changes the state exp_avg of body.weight of AdamW"""

    def on_after_backward(self) -> None:
        for state in self.trainer.optimizers[0].state.values():
            if "exp_avg" in state:
                state["exp_avg"].mul_(0.9)
            break


class Renormalises(Net):
    """training_step of Renormalises changes the Parameter head.weight"""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.head.weight.mul_(0.99)
        return self.loss(batch)


class ShadowWeights:
    """As popular libraries keep averages: in an object, outside of every module."""

    def __init__(self, module: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in module.parameters()]

    def update(self, module: nn.Module) -> None:
        for mine, parameter in zip(self.shadow, module.parameters(), strict=True):
            mine.lerp_(parameter.detach(), 0.1)


class OwnAverage(L.Callback):
    """on_train_batch_end of OwnAverage changes self.average.shadow[0], self.average.shadow[1]"""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = ShadowWeights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.average.update(pl_module)


class HiddenTeacher(Net):
    """on_train_batch_end of HiddenTeacher changes self.hidden[0].weight, self.hidden[0].bias"""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(WIDTH, 2 * WIDTH)]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            teacher = self.hidden[0].parameters()
            for mine, parameter in zip(teacher, self.body.parameters(), strict=True):
                mine.lerp_(parameter, 0.1)


class ParameterAttribute(Net):
    """on_after_backward of ParameterAttribute changes the attribute norms of the Parameter"""

    def on_after_backward(self) -> None:
        weight: Any = self.body.weight
        weight.norms = [*getattr(weight, "norms", []), 1.0]


class OwnGenerator:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)


class HiddenGenerator(Net):
    """training_step of HiddenGenerator changes self.noise.generator"""

    def __init__(self) -> None:
        super().__init__()
        self.noise = OwnGenerator()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.rand(1, generator=self.noise.generator)
        return self.loss(batch)


class Clock(Net):
    """training_step gives another loss the second time"""

    ticks: ClassVar[Iterator[int]] = iter(range(10**9))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (1 + 0.1 * next(self.ticks))


class Setting(Net):
    """training_step of Setting changes the settings of torch"""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        on = not torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = on
        return self.loss(batch)


class Refuses(Net):
    """a step cannot be run again: ValueError: batch 2 was here before"""

    class Ids:
        def __init__(self) -> None:
            self.ids: set[int] = set()

    def __init__(self) -> None:
        super().__init__()
        self.known = Refuses.Ids()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.known.ids:
            raise ValueError(f"batch {batch_idx} was here before")
        self.known.ids.add(batch_idx)
        return self.loss(batch)


class DataModule(L.LightningDataModule):
    """on_after_batch_transfer of DataModule changes self.seen.total, self.seen.count"""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Meter()

    def train_dataloader(self) -> Any:
        return rows()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.add(torch.ones(()))
        return batch


class NewParameter(Net):
    """a replayed step changes the Parameter extra_3, the gradient of extra_3"""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        count = sum(name.startswith("extra_") for name, _ in self.named_parameters())
        self.register_parameter(f"extra_{count}", nn.Parameter(torch.zeros(1)))


IN_A_STEP = [
    *(
        OwnObject,
        ObjectOfCallback,
        Global,
        GlobalBank,
        OfClass,
        Deep,
        GroupEntry,
        Momentum,
        Renormalises,
    ),
    *(ParameterAttribute, HiddenGenerator, Clock, Setting, Refuses, DataModule, NewParameter),
]
AFTER_A_STEP = [OwnAverage, HiddenTeacher]


@pytest.mark.parametrize("effect", [*IN_A_STEP, *AFTER_A_STEP])
def test_a_side_effect_is_found_and_named(effect: type[Any], tmp_path: Path) -> None:
    planted, options = effect(), {}
    model: Any = planted if isinstance(planted, L.LightningModule) else Net()
    if isinstance(planted, L.LightningDataModule):
        options = {"loader": planted}
    callbacks = [planted] if isinstance(planted, L.Callback) else []
    event = rehearsed(model, tmp_path, callbacks, **options)
    assert effect.__doc__ is not None
    assert any(line.startswith(effect.__doc__) for line in event.differs), event.differs
    assert event.outcome == ("one step" if effect in AFTER_A_STEP else "limits only")
    assert event.differs[0] in event.sentence()


def test_a_global_list_that_is_merely_appended_to_is_named_and_confines_nothing(
    tmp_path: Path,
) -> None:
    event = rehearsed(Logs(), tmp_path)
    assert event.outcome == "passed"
    assert event.differs == (f"{Logs.__doc__}: replays append to it too",)
    assert NOTHING_ELSE in event.reason


# -- when, and what follows ----------------------------------------------------------------------


class AsksLate(L.Callback):
    """Has the fallback look into the run in step 12, and counts the training steps."""

    def __init__(self, fallback: PrecisionFallback) -> None:
        self.fallback = fallback
        self.asked = [False]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plugin: Any = trainer.precision_plugin
        plugin.on_input.append(self.arrived)

    def arrived(self, batch: Any) -> None:
        if supervisor_of(self.fallback).count.done == 12 and not self.asked[0]:
            self.asked[0] = True
            supervisor_of(self.fallback).tell(Asked(at=12, onset=12, risen=False))


@pytest.mark.parametrize(
    ("model", "tiers"),
    [(Net, {"one step", "trajectory"}), (HiddenTeacher, {"one step"}), (Global, set())],
)
def test_the_watch_keeps_to_what_the_rehearsal_has_shown(
    model: type[Net], tiers: set[str], tmp_path: Path
) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path, probe_every_n_steps=None, limit=None)
    train(model(), fallback, [AsksLate(fallback)], max_steps=16)
    verdicts = read_events(tmp_path, kinds=["verdict"])
    assert {event.tier for event in verdicts if isinstance(event, Verdict)} == tiers
    assert (fallback.steps.replayed > 0) == bool(tiers)


def test_without_a_rehearsal_nothing_is_told(tmp_path: Path) -> None:
    RUNS["steps"] = 0
    train(Global(), PrecisionFallback(dirpath=tmp_path, rehearse=False))
    assert read_events(tmp_path, kinds=["rehearsal"]) == []
    assert RUNS["steps"] == STEPS


def test_it_stops_with_the_first_step_that_leaves_something(tmp_path: Path) -> None:
    """One control, and one more to see in which hook."""
    RUNS["steps"] = 0
    event = rehearsed(Global(), tmp_path)
    assert RUNS["steps"] == STEPS + 2
    assert event.numbers["replayed"] == 2


def test_what_snapshots_hold_is_put_back(tmp_path: Path) -> None:
    model, without = Momentum(), Momentum()
    assert rehearsed(model, tmp_path / "with").outcome == "limits only"
    train(without, PrecisionFallback(dirpath=tmp_path / "without", rehearse=False))
    assert same_weights(model, without)


class Warmup(Net):
    """The learning rate is 0 in the first steps."""

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(step - 3, 0) / 9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_it_waits_for_steps_that_change_the_weights(tmp_path: Path) -> None:
    event = rehearsed(Warmup(), tmp_path)
    assert event.step == 7  # of the last step it is not known
    assert event.outcome == "passed"


class OwnBatches(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_step_that_takes_its_own_batches_is_watched_by_limits(tmp_path: Path) -> None:
    event = rehearsed(OwnBatches(), tmp_path)
    assert (event.step, event.outcome) == (0, "limits only")
    assert "takes its batches out of the loader itself" in event.reason


class Uncopyable:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this is no batch to copy")


class Uncopied(Net):
    def loss(self, x: Any) -> Tensor:
        return super().loss(x.rows)


def test_batches_that_cannot_be_recorded_are_told(tmp_path: Path) -> None:
    data: Any = [torch.randn(WIDTH) for _ in range(4 * 24)]
    loader = DataLoader(data, batch_size=4, collate_fn=lambda each: Uncopyable(torch.stack(each)))
    event = rehearsed(Uncopied(), tmp_path, loader=loader, max_steps=20)
    assert (event.step, event.outcome) == (16, "limits only")
    assert "no steps are recorded" in event.reason


class OfAFormat(Net):
    """A side effect in one format."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        head: Any = self.head
        if head.format.name == "fp8-rowwise":
            self.meter.add(torch.ones(()))
        return self.loss(batch)


class Stage(L.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.precision_plugin.precision_map.set("head", "fp8-rowwise", reason="a stage")


def test_a_control_is_repeated_after_a_change_of_formats(tmp_path: Path) -> None:
    train(OfAFormat(), PrecisionFallback(dirpath=tmp_path), [Stage()], max_steps=10)
    first, second = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(first, Rehearsed)
    assert isinstance(second, Rehearsed)
    assert (first.outcome, second.outcome) == ("passed", "limits only")
    assert second.step == 7  # after the first step in these formats
    train(Net(), PrecisionFallback(dirpath=tmp_path / "clean"), [Stage()], max_steps=10)
    assert len(read_events(tmp_path / "clean", kinds=["rehearsal"])) == 1


class Unfreezes(Net):
    """A side effect of the second optimizer's part, which is unfrozen later."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step >= 6:
            self.meter.add(torch.ones(()))
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 6:
            group: Any = {"params": [nn.Parameter(torch.zeros(1))]}
            self.trainer.optimizers[0].add_param_group(group)


def test_a_control_is_repeated_after_an_unfreezing(tmp_path: Path) -> None:
    train(Unfreezes(), PrecisionFallback(dirpath=tmp_path), max_steps=10)
    first, second = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(first, Rehearsed)
    assert isinstance(second, Rehearsed)
    assert (first.outcome, second.outcome) == ("passed", "limits only")
    assert second.differs[0].startswith("training_step of Unfreezes changes self.meter.total")


def test_what_it_says_can_be_read_back(tmp_path: Path) -> None:
    event = rehearsed(OwnObject(), tmp_path)
    assert event.sentence().startswith("step 3: rehearsal limits only: training_step of OwnObject")
    assert event.numbers["incident_seconds"] > 0
    assert event.numbers["incident_bytes"] > 0
    assert isinstance(event.differs, tuple)
    assert event.not_looked_at == ()


class Opaque(L.Callback):
    def __init__(self) -> None:
        self.stream = iter(range(3))


def test_what_cannot_be_looked_into_is_listed_once(tmp_path: Path) -> None:
    event = rehearsed(Net(), tmp_path, [Opaque()])
    assert event.outcome == "passed"
    assert event.not_looked_at == ("self.stream of Opaque (range_iterator)",)


class Average(L.Callback):
    def __init__(self) -> None:
        self.ema, self.count = torch.zeros(WIDTH), 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ema.lerp_(batch.mean(dim=0), 0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


def test_what_hooks_write_and_a_replay_puts_back_is_told_too(tmp_path: Path) -> None:
    event = rehearsed(Net(), tmp_path, [Average()])
    assert event.outcome == "passed"
    assert event.put_back == (
        "on_train_batch_start of Average changes self.ema",
        "on_train_batch_end of Average changes self.count",
        "on_train_batch_end of Net changes self.told",
    )
    assert "on_train_batch_start of Average changes self.ema, which is put back" in event.reason


class Jumps(Global):
    """The loss is far higher from step 90 on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (20 if self.trainer.global_step >= 90 else 1)


class PlainJumps(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (20 if self.trainer.global_step >= 90 else 1)


@pytest.mark.parametrize(("model", "asks"), [(Jumps, True), (PlainJumps, False)])
def test_where_nothing_can_be_replayed_a_suspicion_asks_the_user(
    model: type[Net], asks: bool, tmp_path: Path
) -> None:
    fallback = PrecisionFallback(dirpath=tmp_path, probe_every_n_steps=None, limit=None)
    generator = torch.Generator().manual_seed(0)
    data: Any = torch.randn(4 * 100, WIDTH, generator=generator)
    train(model(), fallback, loader=DataLoader(data, batch_size=4), max_steps=100)
    suspicions = read_events(tmp_path, kinds=["suspect"])
    assert suspicions
    assert all(("nothing can be replayed here" in e.action) == asks for e in suspicions)
    assert bool(read_events(tmp_path, kinds=["verdict"])) != asks
