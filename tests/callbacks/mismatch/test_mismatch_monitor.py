"""The monitor in real runs: what it measures, what it leaves alone, and when it acts."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_fp import FP8Precision, FP16Precision
from lightning_fp.callbacks import ParityProbe
from lightning_fp.callbacks.mismatch.mismatch_monitor import MismatchMonitor
from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.records import read_events, read_mismatch, read_mismatch_causes
from lightning_fp.rl import SampleOrigin, correction
from lightning_fp.stability import MismatchDetector
from lightning_fp.telemetry.mismatch.mismatch_remedy import raised_formats, write_formats
from tests.helper import LanguageModel, fit, make_trainer, same_weights, text_loader

TOKENS = 16
BATCH = 4
SOON = MismatchDetector(armed=16)


def logprobs_of(module: nn.Module, batch: Tensor) -> Tensor:
    scores = module(batch[:, :-1]).float().log_softmax(dim=-1)
    return scores.gather(2, batch[:, 1:].unsqueeze(2)).squeeze(2)


class Drifting:
    """An engine that is `usual` off, and from step `start` on more with every step."""

    def __init__(self, start: int = 10**9, span: float = 10.0) -> None:
        self.start, self.span = start, span

    def __call__(self, trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        train = logprobs_of(module, batch)
        return self.rollout(train, trainer.global_step), train, torch.ones_like(batch[:, 1:])

    def rollout(self, train: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        size = 1e-3 * math.exp(max(0, step - self.start) / self.span)
        return (train + size * torch.randn(train.shape, generator=generator)).clamp(max=0)


class Pushing(LanguageModel):
    """Measures in its training step."""

    def __init__(self, monitor: MismatchMonitor, engine: Drifting, **options: Any) -> None:
        super().__init__(**options)
        self.__dict__["monitor"], self.engine = monitor, engine

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        train = logprobs_of(self, batch)
        self.monitor.update(self.engine.rollout(train.detach(), self.global_step), train)
        self.losses.append(-train.mean().item())
        return -train.mean()


class Reader(L.Callback):
    """Reads before each step what a gate would."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        value = trainer.callback_metrics.get("mismatch/k3_kl")
        self.seen.append(None if value is None else float(value))


def plugin(scaling: Any = "dynamic", **options: Any) -> FP8Precision:
    return FP8Precision(scaling, layers={"*": f"fp8-{scaling}"}, **options)


def column(directory: Path, name: str) -> list[Any]:
    return read_mismatch(directory)[name].to_pylist()


# --- what is measured -----------------------------------------------------------------------------


def test_every_step_is_measured_and_told(tmp_path: Path) -> None:
    reader = Reader()
    monitor = MismatchMonitor(Drifting(), aliases="trl", dirpath=tmp_path / "run")
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(plugin(), max_steps=6, callbacks=[monitor, reader], logger=logger, log_every_n_steps=1)
    rows = read_mismatch(tmp_path / "run").to_pylist()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens"] == BATCH * TOKENS for row in rows)
    assert all(1e-4 < row["logprob_abs_diff_mean"] < 1e-2 for row in rows)
    assert monitor.latest is not None
    assert monitor.latest["k3_kl"] == rows[-1]["k3_kl"]
    assert reader.seen[0] is None
    assert reader.seen[1:] == pytest.approx([row["k3_kl"] for row in rows[:-1]], rel=1e-6)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"mismatch/k3_kl", "mismatch/seq_logprob_abs_diff_max"} <= set(header)
    assert "sampling/sampling_logp_difference/mean" in header  # as the framework calls it


def test_pushed_over_micro_batches_and_not_by_replays(tmp_path: Path) -> None:
    """One step is all its micro-batches, once, though a probe runs them several times."""
    monitor = MismatchMonitor(dirpath=tmp_path)
    fit(
        plugin(),
        Pushing(monitor, Drifting()),
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[monitor, ParityProbe(every_n_steps=1, worst=0, seed=None)],
    )
    assert column(tmp_path, "tokens") == [2 * BATCH * TOKENS] * 3


def test_one_step_in_so_many(tmp_path: Path) -> None:
    monitor = MismatchMonitor(Drifting(), every_n_steps=4, dirpath=tmp_path)
    fit(None, max_steps=10, callbacks=[monitor])
    assert column(tmp_path, "step") == [1, 5, 9]


def test_the_hook_sees_the_formats_of_training(tmp_path: Path) -> None:
    """Against fp32 of the same weights FP8 is far off; in evaluation it would be bf16."""
    gaps = []
    for scaling in ("bf16", "fp8-dynamic"):

        def hook(trainer: L.Trainer, module: Any, batch: Tensor) -> Any:
            train = logprobs_of(module, batch)
            with torch.autocast("cpu", enabled=False):
                table = trainer.precision_plugin.precision_map
                with table.overridden(dict.fromkeys(table.layers, "fp32")):
                    return logprobs_of(module, batch), train, None

        monitor = MismatchMonitor(hook)
        fit(FP8Precision(scaling, layers={"*": scaling}), max_steps=2, callbacks=[monitor])
        assert monitor.latest is not None
        gaps.append(monitor.latest["logprob_abs_diff_mean"])
    assert gaps[1] > 3 * gaps[0]


@pytest.mark.parametrize(
    "make", [lambda: plugin("delayed"), lambda: FP16Precision("16-true")], ids=["fp8", "fp16"]
)
def test_nothing_of_the_hook_remains(make: Callable[[], LayerPrecision]) -> None:
    """It draws random numbers and runs a forward of its own; the run is the same."""

    def hook(trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        torch.rand(7)
        return Drifting()(trainer, module, 0 * batch)

    models = [
        fit(make(), LanguageModel(dropout=0.1), max_steps=6, callbacks=callbacks)
        for callbacks in ([], [MismatchMonitor(hook)])
    ]
    assert models[0].losses == models[1].losses
    assert same_weights(*models)


# --- early warning ----------------------------------------------------------------------------


def test_warns_without_a_plugin_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = MismatchMonitor(Drifting(start=20), detector=SOON, dirpath=tmp_path)
    with caplog.at_level(logging.WARNING):
        fit(None, max_steps=48, callbacks=[monitor])
    (event,) = read_events(tmp_path, kinds=["suspect"])
    assert 20 < event.step < 36
    assert event.numbers["factor"] < 5
    assert event.numbers["mismatch/k3_kl"] == column(tmp_path, "k3_kl")[event.step - 1]
    assert sum("training and rollout drift apart" in line for line in caplog.messages) == 1


def test_raises_precision_once_in_a_hold(tmp_path: Path) -> None:
    """From FP8 to bf16; it does not help, and without a loss scaler nothing else is done."""
    model = LanguageModel()
    monitor = MismatchMonitor(
        Drifting(start=20), detector=SOON, act="raise-precision", hold_steps=16, dirpath=tmp_path
    )
    fit(plugin(), model, max_steps=56, callbacks=[monitor])
    formats = {layer.format.name for layer in model.modules() if hasattr(layer, "format")}
    assert formats == {"bf16"}
    first, second = read_events(tmp_path, kinds=["suspect"])
    assert first.action == "9 layers fp8-dynamic -> bf16; the rollout engine has to follow"
    assert second.action == "no layer is left in FP8; for fp16 take FP16Precision"
    assert second.step == first.step + 16  # the hold is over, and it still grows
    (change,) = read_events(tmp_path, kinds=["format"])
    assert change.step == first.step
    assert len(change.layers) == 9
    assert change.reason == first.reason


class Origin:
    """An engine whose weights grow old, or whose routers choose other experts, from a step on."""

    def __init__(self, cause: str, start: int = 20) -> None:
        self.cause, self.start = cause, start

    def __call__(self, trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        train, step = logprobs_of(module, batch), trainer.global_step
        generator = torch.Generator().manual_seed(step)
        odd = (torch.arange(train.shape[1]) % 2 == 1).expand(train.shape) & (step >= self.start)
        size = torch.where(odd, 3e-2, 1e-3)
        rollout = (train + size * torch.randn(train.shape, generator=generator)).clamp(max=0)
        if self.cause == "staleness":
            origin = SampleOrigin(rollout_version=step - 2 * odd.long(), train_version=step)
        else:
            ids = torch.zeros_like(odd, dtype=torch.long)
            origin = SampleOrigin(rollout_experts={"b": ids + odd}, train_experts={"b": ids})
        return rollout, train, torch.ones_like(batch[:, 1:]), origin


@pytest.mark.parametrize("cause", ["staleness", "routing"])
def test_tightens_what_precision_would_not_heal(tmp_path: Path, cause: str) -> None:
    model = LanguageModel()
    monitor = MismatchMonitor(
        Origin(cause),
        detector=SOON,
        act="by-cause",
        correction="icepop",
        hold_steps=8,
        dirpath=tmp_path,
    )
    fit(plugin(), model, max_steps=32, callbacks=[monitor])
    assert {x.format.name for x in model.modules() if hasattr(x, "format")} == {"fp8-dynamic"}
    assert monitor.causes is not None
    assert monitor.causes.main == cause
    assert monitor.correction is not None
    first, *others = read_events(tmp_path, kinds=["suspect"])
    assert f"% of k3 from {cause}" in first.reason
    assert first.action == "masked token weights in [0.5, 5] -> [0.707, 2.24]"
    assert first.numbers[f"mismatch/cause/{cause}"] > 0.9
    tightened = correction("icepop")
    for _ in (first, *others):
        tightened = tightened.tightened()
    assert (monitor.correction.low, monitor.correction.high) == (tightened.low, tightened.high)
    assert not read_events(tmp_path, kinds=["format"])
    told = read_mismatch_causes(tmp_path)
    assert told["step"].to_pylist() == list(range(1, 33))
    assert told[cause].to_pylist()[-1] == pytest.approx(monitor.causes.share[cause])

    resumed = MismatchMonitor(act="by-cause", correction="icepop")
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.correction is not None
    assert resumed.correction.words == monitor.correction.words


def test_raises_no_precision_for_another_cause(tmp_path: Path) -> None:
    monitor = MismatchMonitor(
        Origin("staleness"), detector=SOON, act="raise-precision", dirpath=tmp_path
    )
    fit(plugin(), max_steps=32, callbacks=[monitor])
    (event,) = read_events(tmp_path, kinds=["suspect"])
    assert "synchronise" in event.reason
    assert event.action == ""
    assert not read_events(tmp_path, kinds=["format"])


def test_says_it_before_it_acts(tmp_path: Path) -> None:
    monitor = MismatchMonitor(Drifting(start=20), detector=SOON, act="by-cause", dirpath=tmp_path)
    fit(plugin(), max_steps=40, callbacks=[monitor])
    said, done = read_events(tmp_path, kinds=["suspect", "format"])
    assert said.kind == "suspect"
    assert "fp8-dynamic -> bf16" in said.action
    assert done.kind == "format"


def test_only_measures(tmp_path: Path) -> None:
    engine = Drifting(start=20, span=1)
    monitor = MismatchMonitor(engine, detector=SOON, act=None, dirpath=tmp_path)
    fit(None, max_steps=30, callbacks=[monitor])
    assert len(column(tmp_path, "step")) == 30
    assert not (tmp_path / "events.jsonl").exists()


def test_the_way_up() -> None:
    """FP8 first; then fp16 where the loss is scaled; what was taken out of fp16 stays out."""
    plain, scaled = plugin(), FP16Precision(layers={"*.fc1": "bf16", "*.fc2": "fp8-dynamic"})
    for ours in (plain, scaled):
        ours.convert_module(LanguageModel().model)

    def raised(ours: LayerPrecision, to: LinearFormat | None = None) -> dict[str, int]:
        found = raised_formats(ours, to)
        write_formats(ours.precision_map, found, "test")
        ours.precision_map.apply()
        return Counter(format.name for format in found.values())

    assert raised(plain) == {"bf16": 9}
    assert raised(plain) == {}
    assert raised(plain, linear_format("fp32")) == {"fp32": 9}
    assert raised(scaled) == {"fp16": 2}  # those in FP8
    assert raised(scaled) == {"fp16": 2}  # those in bf16
    assert raised(scaled) == {}
    scaled.precision_map.set("*", "bf16", reason="the loss scale is at its least")
    scaled.precision_map.apply()
    assert raised(scaled) == {}


# --- state --------------------------------------------------------------------------------------


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Interrupted between growth and warning: the run acts when the whole one does."""

    def run(directory: Path, epochs: int, ckpt: Path | None = None) -> dict[str, Any]:
        monitor = MismatchMonitor(
            Drifting(start=18), detector=SOON, act="raise-precision", dirpath=directory
        )
        keep = ModelCheckpoint(directory, filename="last", save_on_train_epoch_end=True)
        trainer = make_trainer(
            plugin("delayed"),
            max_epochs=epochs,
            callbacks=[monitor, keep],
            enable_checkpointing=True,
        )
        trainer.fit(LanguageModel(), text_loader(48), ckpt_path=ckpt, weights_only=True)
        return torch.load(directory / "last.ckpt", weights_only=True)

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    again = run(tmp_path / "parts", 3, tmp_path / "parts" / "last.ckpt")
    assert all(
        torch.equal(value, again["state_dict"][name]) for name, value in whole["state_dict"].items()
    )
    states = [run["callbacks"]["MismatchMonitor"] for run in (whole, again)]
    assert states[0] == states[1]
    tables = [read_mismatch(tmp_path / name).to_pylist() for name in ("whole", "parts")]
    assert tables[0] == tables[1]
    told = [
        [(e.kind, e.step, e.reason) for e in read_events(tmp_path / name) if e.kind != "resumed"]
        for name in ("whole", "parts")
    ]
    assert told[0] == told[1]
    assert [kind for kind, *_ in told[0]] == ["suspect", "format"]


def test_state_of_another_version() -> None:
    with pytest.raises(ValueError, match="MismatchMonitor state must have version 1, got None"):
        MismatchMonitor().load_state_dict({})


# --- bad input ----------------------------------------------------------------------------------

LOGPROBS = torch.full((2, 3), -1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((LOGPROBS, LOGPROBS[:, :2], None), "train_logprobs must have the shape of rollout"),
        ((LOGPROBS, LOGPROBS.exp(), None), "must be log-probabilities, 0 or less, got 0.36"),
        ((LOGPROBS, LOGPROBS, 0 * LOGPROBS), "must give a mask that counts tokens"),
        ((LOGPROBS * math.inf, LOGPROBS, None), "must give finite log-probabilities, got 6 tokens"),
        ((LOGPROBS,), r"must give \(rollout_logprobs, train_logprobs, mask\), got a tuple of 1"),
        (LOGPROBS, r"got a tensor of shape \(2, 3\)"),
        (
            (LOGPROBS, [1.0], None),
            r"must give tensors \[batch, tokens\], got a list of 1 for train",
        ),
    ],
)
def test_bad_log_probabilities_are_refused_at_once(given: Any, message: str) -> None:
    def engine(trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        return given

    with pytest.raises(ValueError, match=f"engine.*{message}"):
        fit(None, max_steps=3, callbacks=[MismatchMonitor(engine)])


@pytest.mark.parametrize("later", [LOGPROBS, (LOGPROBS, LOGPROBS, 0 * LOGPROBS)])
def test_what_goes_wrong_later_does_not_end_the_run(
    tmp_path: Path, later: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def engine(trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        return later if trainer.global_step in (3, 5) else (LOGPROBS, LOGPROBS - 0.1, None)

    model = fit(None, max_steps=8, callbacks=[MismatchMonitor(engine, dirpath=tmp_path)])
    assert len(model.losses) == 8
    # A step without tokens has no row; after a failure of the hook there are none any more.
    assert column(tmp_path, "step") == ([1, 2, 3] if later is LOGPROBS else [1, 2, 3, 5, 7, 8])
    told = [r for r in caplog.records if r.name == "lightning_fp.telemetry.mismatch.mismatch_log"]
    assert len(told) == 1


def test_push_in_the_wrong_place(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="must be called in a training step; put the monitor"):
        MismatchMonitor().update(LOGPROBS, LOGPROBS)
    with pytest.raises(ValueError, match=r"must not be called beside logprobs=logprobs_of"):
        MismatchMonitor(logprobs_of).update(LOGPROBS, LOGPROBS)  # type: ignore[arg-type]
    fit(None, max_steps=2, callbacks=[MismatchMonitor()])
    assert "MismatchMonitor has measured nothing" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"hold_steps": 0}, "hold_steps must be at least 1, got 0"),
        ({"act": "stop"}, "act must be 'log', 'raise-precision', 'by-cause' or None, got 'stop'"),
        ({"raise_to": "fp16"}, "raise_to must be None unless act is 'raise-precision'"),
        ({"logprobs": "engine"}, "logprobs must be a function or None, got 'engine'"),
        ({"aliases": "vllm"}, "aliases must be one of"),
        ({"threshold": 1.0}, "threshold must be above 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MismatchMonitor(**options)


def test_raising_precision_needs_a_table() -> None:
    with pytest.raises(ValueError, match="act='raise-precision' needs a precision plugin of light"):
        fit(None, max_steps=1, callbacks=[MismatchMonitor(act="raise-precision")])


def test_values_are_those_of_one_pass(tmp_path: Path) -> None:
    """The row is the metric over the step's micro-batches."""
    given: list[tuple[Tensor, Tensor]] = []

    def engine(trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        rollout, train, _ = Drifting()(trainer, module, batch)
        given.append((rollout, train))
        return rollout, train

    fit(
        None,
        max_steps=1,
        accumulate_grad_batches=3,
        callbacks=[MismatchMonitor(engine, dirpath=tmp_path)],
    )
    metric = TrainingInferenceMismatch()
    metric.update(*(torch.cat(part) for part in zip(*given, strict=True)))
    (row,) = read_mismatch(tmp_path).to_pylist()
    for name, value in metric.compute().items():
        assert row[name] == pytest.approx(value.item(), rel=1e-12), name
