"""A run with the probe is the run without it, bit for bit; and the probe finds the fault."""

from __future__ import annotations

import copy
import csv
import json
import logging
import os
import random
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_fp import FP8Precision, FP16Precision
from lightning_fp.callbacks import ClampMonitor, ParityProbe
from lightning_fp.records import read_statistics
from lightning_fp.records.parity import FILE
from lightning_fp.stability import Parity
from tests.helper import (
    LanguageModel,
    TinyGPT,
    make_trainer,
    next_byte_loss,
    same_weights,
    text_loader,
)

FAULTY = "model.gpt.blocks.1.fc1"


class Noisy(nn.Module):
    """A GPT between everything that a careless replay would change."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = TinyGPT(dropout=0.2)
        self.norm = nn.BatchNorm1d(256)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        logits = self.gpt(tokens)
        return self.norm(logits.float().flatten(0, 1)).view_as(logits)


class RichModule(LanguageModel):
    """Logs in every way, keeps metrics, draws random numbers, and writes into its batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Noisy())
        self.mean = torchmetrics.MeanMetric()
        self.group = torchmetrics.MetricCollection(
            [torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()]
        )

    def loss(self, batch: Tensor) -> Tensor:
        batch[:, 0] = random.randrange(256)
        batch[:, 1] = np.random.randint(256)
        batch[:, 2] = (batch[:, 2] + 1) % 256  # a second time would change it again
        return next_byte_loss(self, batch)

    def report(self, loss: Tensor) -> None:
        value = loss.detach()
        self.losses.append(value.item())
        self.mean(value)
        self.group(value.view(1), torch.ones(1))
        self.log("loss", value, on_step=True, on_epoch=True, prog_bar=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.group, on_step=False, on_epoch=True)
        self.log_dict({"double": 2 * value, "seen": self.model.seen})
        self.logger.experiment.log_metrics({"direct": value.item()}, step=self.global_step)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.report(loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class ManualModule(RichModule):
    """Two optimizers, one of them stepping through a closure, and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        norms, body = self.optimizers()
        loss = self.loss(batch)
        with norms.toggle_model():
            norms.zero_grad()
            self.manual_backward(loss)
            norms.step()

        def closure() -> Tensor:
            body.zero_grad()
            again = next_byte_loss(self, batch)
            self.manual_backward(again)
            return again

        body.step(closure)
        self.lr_schedulers().step()
        self.report(loss)

    def configure_optimizers(self) -> Any:
        norms = torch.optim.SGD(self.model.norm.parameters(), lr=1e-2)
        body = torch.optim.AdamW(self.model.gpt.parameters(), lr=1e-3)
        return [norms, body], [torch.optim.lr_scheduler.StepLR(body, 2)]


class CompiledModule(RichModule):
    def configure_model(self) -> None:
        self.model.gpt.blocks[0].fc1.compile(backend="aot_eager")


class Recorder(L.Callback):
    """What other callbacks see: they must not hear of the replays."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_before_backward(self, *_: Any) -> None:
        self.heard.append("before backward")

    def on_after_backward(self, *_: Any) -> None:
        self.heard.append("after backward")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.heard.append("zero grad")


def run(
    directory: Path,
    module: RichModule,
    probe: ParityProbe | None,
    *,
    scaling: str = "delayed",
    callbacks: list[L.Callback] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train, and return everything that two equal runs must agree on."""
    L.seed_everything(1, verbose=False)
    plugin, recorder = FP8Precision(scaling), Recorder()
    trainer = make_trainer(
        plugin,
        logger=CSVLogger(directory, flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        callbacks=[recorder, *(callbacks or []), *([probe] if probe else [])],
        **{"max_epochs": 2, "limit_train_batches": 4, **options},
    )
    loader = text_loader(64, shuffle=True)
    trainer.fit(module, loader)
    return {
        "model": {key: value.clone() for key, value in module.state_dict().items()},
        "seen": module.model.seen.clone(),
        "optimizers": [copy.deepcopy(o.state_dict()) for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "table": plugin.precision_map.state_dict(),
        "watched": plugin.precision_map.scale_history._recorded.clone(),
        "changes": len(plugin.precision_map.changes),
        "losses": module.losses,
        "logged": {k: v for k, v in trainer.callback_metrics.items()},
        "bar": dict(trainer.progress_bar_metrics),
        "csv": user_rows(directory),
        "heard": recorder.heard,
        "steps": trainer.global_step,
        "random": (random.getstate(), np.random.get_state()[1], torch.get_rng_state()),
        "gradients": [p.grad for p in module.parameters()],
    }


def user_rows(directory: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what the probe logs."""
    path = directory / "lightning_logs/version_0/metrics.csv"
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if not any(name.startswith("precision/") for name in row)]


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif isinstance(one, (Tensor, np.ndarray)):
        a, b = torch.as_tensor(one), torch.as_tensor(other)
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), path
    else:
        assert one == other, path


CASES: dict[str, tuple[type[RichModule], dict[str, Any]]] = {
    "delayed": (RichModule, {}),
    "dynamic": (RichModule, {"scaling": "dynamic"}),
    "auto": (RichModule, {"scaling": "auto"}),
    "accumulation": (RichModule, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "manual": (ManualModule, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_the_probe_is_the_run_without_it(case: str, tmp_path: Path) -> None:
    module, options = CASES[case]
    probe = ParityProbe(2, worst=2, seed=None, dirpath=tmp_path)
    without = run(tmp_path / "without", module(), None, **options)
    with_it = run(tmp_path / "with", module(), probe, **options)
    assert_same(with_it, without)
    assert list(probe.results) == list(range(0, with_it["steps"], 2))
    for parity in probe.results.values():
        assert parity.noise == 0
        assert 0.9 < parity.grad_cosine < 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_compiled_layers_get_no_new_graphs(tmp_path: Path) -> None:
    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.utils.counters.clear()
    options = {"max_epochs": 1, "limit_train_batches": 3}
    without = run(tmp_path / "without", CompiledModule(), None, **options)
    compiled = graphs()
    torch._dynamo.reset()
    probe = ParityProbe(2, worst=1, seed=None, dirpath=tmp_path)
    with_it = run(tmp_path / "with", CompiledModule(), probe, **options)
    assert graphs() == 2 * compiled > 0
    assert list(probe.results) == [0, 2]
    assert_same(with_it, without)


def train_on_two_ranks(directory: Path, *callbacks: L.Callback, static: bool = False) -> RichModule:
    L.seed_everything(1, verbose=False)
    module = RichModule()
    strategy = DDPStrategy(
        start_method="fork",
        process_group_backend="gloo",
        static_graph=static,
        timeout=timedelta(seconds=30),
    )
    trainer = make_trainer(
        FP8Precision("delayed"),
        strategy=strategy,
        devices=2,
        max_steps=6,
        logger=CSVLogger(directory, flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        callbacks=list(callbacks),
    )
    trainer.fit(module, text_loader(64))
    return module


# A fork has none of the threads that OpenMP counts on, and waits for them without end.
forks = pytest.mark.skipif(
    os.environ.get("TEST_THREADS", "1") != "1", reason="a process of several threads is not forked"
)


@forks
@pytest.mark.parametrize("static", [False, True])
def test_two_ranks(static: bool, tmp_path: Path) -> None:
    probe = ParityProbe(2, worst=2, seed=None, dirpath=tmp_path)
    without = train_on_two_ranks(tmp_path / "without", static=static)
    with_it = train_on_two_ranks(tmp_path / "with", probe, static=static)
    assert same_weights(with_it, without)
    assert user_rows(tmp_path / "with") == user_rows(tmp_path / "without")
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["noise"] == 0 and 0.9 < row["grad_cosine"] < 1 for row in rows)


@forks
def test_a_failure_on_one_rank_only(tmp_path: Path) -> None:
    failing = Exhausting(torch.OutOfMemoryError("CUDA out of memory"), rank=1)
    probe = ParityProbe(2, worst=2, seed=None, dirpath=tmp_path)
    without = train_on_two_ranks(tmp_path / "without")
    with_it = train_on_two_ranks(tmp_path / "with", probe, failing)
    assert same_weights(with_it, without)
    assert user_rows(tmp_path / "with") == user_rows(tmp_path / "without")
    assert len((tmp_path / FILE).read_text().splitlines()) == 1


def test_the_clamp_monitor_sees_the_same_run(tmp_path: Path) -> None:
    def rows(name: str, probe: ParityProbe | None) -> list[dict[str, Any]]:
        monitor = ClampMonitor(every_n_steps=2, sample=2, dirpath=tmp_path / name)
        run(tmp_path / name, RichModule(), probe, callbacks=[monitor])
        return read_statistics(tmp_path / name).to_pylist()

    without = rows("without", None)
    with_it = rows("with", ParityProbe(2, worst=1, seed=None, dirpath=tmp_path))
    assert len(without) > 50
    assert str(with_it) == str(without)  # as text, in which NaN equals NaN


# -- what it finds and writes -------------------------------------------------------------------


class Fault(L.Callback):
    """Forces one delayed scale 64 times too high, so that the operand clamps."""

    def __init__(self, operand: int) -> None:
        self.operand = operand

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= 2:
            table = trainer.precision_plugin.precision_map
            table.layers[FAULTY].memory.scales[self.operand] *= 64


@pytest.mark.parametrize("operand", [0, 2])
def test_the_layer_at_fault_comes_first(operand: int, tmp_path: Path) -> None:
    probe = ParityProbe(3, seed=None, dirpath=tmp_path)
    run(tmp_path, RichModule(), probe, callbacks=[Fault(operand)], max_epochs=1)
    healthy, faulty = probe.results[0], probe.results[3]
    assert faulty.worst[0].layer == FAULTY
    assert faulty.worst[0].removed_error > 0.5
    assert faulty.grad_error > 3 * healthy.grad_error


def test_what_it_logs_and_writes(tmp_path: Path) -> None:
    probe = ParityProbe(4, worst=3, seed=None, dirpath=tmp_path / "new", log_layers=["*fc1"])
    run(tmp_path, RichModule(), probe)
    rows = [json.loads(line) for line in (tmp_path / "new" / FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4] == list(probe.results)
    last = probe.results[4]
    assert rows[1]["grad_cosine"] == last.grad_cosine
    assert len(rows[1]["layers"]) == len(last.layers) == 9
    assert len(last.worst) == 3
    assert last.layers[-1].format == "bf16"
    assert last.layers[-1].cast_error == 0
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["precision/parity/loss_gap"]]
    assert [int(row["step"]) for row in logged] == [0, 4]
    assert float(logged[1]["precision/parity/grad_cosine"]) == pytest.approx(last.grad_cosine)
    assert float(logged[1]["precision/parity/grad_norm_ratio"]) == pytest.approx(
        last.grad_norm_ratio
    )
    layers = {name for name in logged[1] if name.endswith("/cast_error")}
    assert layers == {f"precision/parity/model.gpt.blocks.{i}.fc1/cast_error" for i in (0, 1)}


def test_in_high_precision_there_is_no_gap(tmp_path: Path) -> None:
    probe = ParityProbe(4, dirpath=tmp_path)
    run(tmp_path, RichModule(), probe, scaling="bf16", max_epochs=1)
    (parity,) = probe.results.values()
    assert (parity.loss_gap, parity.grad_cosine, parity.grad_norm_ratio) == (0, 1, 1)
    assert parity.worst == []


# -- failures -----------------------------------------------------------------------------------


class Exhausting(L.Callback):
    """Raises in the forward of a layer after the first step, in replays only."""

    def __init__(self, error: Exception, rank: int = 0) -> None:
        self.error, self.rank = error, rank
        self.tally = SimpleNamespace(raised=0)  # a number of the callback's own is put back

    @property
    def raised(self) -> int:
        return self.tally.raised

    def on_train_start(self, trainer: L.Trainer, module: RichModule) -> None:
        def hook(*_: Any) -> None:
            if isinstance(trainer.loggers[0], CSVLogger):  # not muted: the training itself
                return
            if trainer.global_step >= 1 and trainer.global_rank == self.rank:
                self.tally.raised += 1
                raise self.error

        module.model.gpt.blocks[1].fc1.register_forward_hook(hook)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("something else")]
)
def test_a_failure_is_logged_once_and_changes_nothing(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = run(tmp_path / "without", RichModule(), None)
    exhausting = Exhausting(error)
    probe = ParityProbe(2, seed=None, dirpath=tmp_path)
    with caplog.at_level(logging.WARNING, logger="lightning_fp"):
        with_it = run(tmp_path / "with", RichModule(), probe, callbacks=[exhausting])
    assert_same(with_it, without)
    assert exhausting.raised == 3
    assert list(probe.results) == [0]
    messages = [r.getMessage() for r in caplog.records if "parity probe" in r.getMessage()]
    expected = "out of memory" if isinstance(error, RuntimeError) else "something else"
    assert len(messages) == 1
    assert expected in messages[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"worst": -1}, "worst must not be negative, got -1"),
        ({"log_layers": "*fc1"}, "log_layers must be a list of texts"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParityProbe(**arguments)


def test_without_our_plugin_the_error_says_what_to_do() -> None:
    trainer = make_trainer(None, callbacks=[ParityProbe()], max_steps=1)
    with pytest.raises(ValueError, match=r"take Trainer\(plugins=FP8Precision"):
        trainer.fit(LanguageModel(), text_loader())


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    probe = ParityProbe(log_layers=["*nothing"], dirpath=tmp_path)
    trainer = make_trainer(FP8Precision(), callbacks=[probe], max_steps=1)
    with pytest.raises(ValueError, match="nothing"):
        trainer.fit(LanguageModel(), text_loader())


def test_fp16_has_nothing_to_compare_with() -> None:
    trainer = make_trainer(FP16Precision(), callbacks=[ParityProbe()], max_steps=1)
    with pytest.raises(ValueError, match="take FP16Monitor"):
        trainer.fit(LanguageModel(), text_loader())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`:UserWarning")
def test_a_step_that_takes_its_own_batches_is_refused() -> None:
    class Own(LanguageModel):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    trainer = make_trainer(FP8Precision(), callbacks=[ParityProbe()], max_steps=1)
    with pytest.raises(ValueError, match="cannot be replayed"):
        trainer.fit(Own(), text_loader())


# -- when ---------------------------------------------------------------------------------------


def probed_steps(probe: ParityProbe, start: int, stop: int) -> list[int]:
    steps = []
    for step in range(start, stop):
        if probe.due(step):
            probe.load_state_dict({"version": 1, "last": step // 10})
            steps.append(step)
    return steps


def test_one_probe_per_period_at_a_step_that_a_resume_does_not_change() -> None:
    steps = probed_steps(ParityProbe(10), 0, 100)
    assert [step // 10 for step in steps] == list(range(10))
    assert len({step % 10 for step in steps}) > 3
    assert steps != probed_steps(ParityProbe(10, seed=1), 0, 100)
    assert probed_steps(ParityProbe(10, seed=None), 0, 100) == list(range(0, 100, 10))

    first, second = ParityProbe(10), ParityProbe(10)
    before = probed_steps(first, 0, 37)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert before + probed_steps(second, 37, 100) == steps
    assert first.state_key == second.state_key != ParityProbe(20).state_key


def test_a_resumed_run_goes_on_with_its_probes(tmp_path: Path) -> None:
    def trainer(probe: ParityProbe, epochs: int, name: str) -> L.Trainer:
        return make_trainer(
            FP8Precision("delayed"),
            callbacks=[probe],
            max_epochs=epochs,
            limit_train_batches=5,
            logger=CSVLogger(tmp_path / name),
        )

    whole = ParityProbe(4, worst=1, dirpath=tmp_path / "a")
    trainer(whole, 2, "whole").fit(RichModule(), text_loader(64))
    part, rest = (ParityProbe(4, worst=1, dirpath=tmp_path / "b") for _ in range(2))
    first = trainer(part, 1, "first")
    first.fit(RichModule(), text_loader(64))
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(rest, 2, "second").fit(RichModule(), text_loader(64), ckpt_path=tmp_path / "last.ckpt")
    both: dict[int, Parity] = {**part.results, **rest.results}
    assert list(both) == list(whole.results)
