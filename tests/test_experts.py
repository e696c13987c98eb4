"""Experts in whole runs: a change of format, a resume, the clamp log, the report, the fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_fp import ClampMonitor, DivergenceDetector, FP8Precision, PrecisionFallback
from lightning_fp.demo.faults.corruption import ForwardCorruption
from lightning_fp.events import Demotion, Rehearsed
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events, read_statistics
from lightning_fp.report.page import write_report
from lightning_fp.stability.respond.limits import LayerLimit
from tests.experts import mixture
from tests.helper import LanguageModel, fit, make_trainer, next_byte_loss, text_loader

FIRST, SECOND = (f"model.model.model.layers.{layer}.mlp.experts" for layer in (0, 1))


class Logits(nn.Module):
    """A model of transformers that takes tokens and returns logits."""

    def __init__(self, implementation: str, name: str = "Mixtral") -> None:
        super().__init__()
        self.model = mixture(name, implementation, vocab_size=256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def language_model(implementation: str = "eager", name: str = "Mixtral") -> LanguageModel:
    return LanguageModel(Logits(implementation, name))


class Demote(L.Callback):
    """Sets one layer's experts to bf16, and an expert of the other, after some steps."""

    def __init__(self, plugin: FP8Precision, after: int) -> None:
        self.plugin, self.after = plugin, after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            self.plugin.precision_map.set(FIRST, "bf16", reason="a test")
            self.plugin.precision_map.set(f"{SECOND}[2]", "bf16", reason="a test")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_a_run_goes_on_bit_for_bit_and_its_report_names_experts(
    name: str, implementation: str, tmp_path: Path
) -> None:
    loader = text_loader(40)  # ten steps an epoch

    def run(directory: str, epochs: int, **options: Any) -> tuple[LanguageModel, L.Trainer]:
        plugin = FP8Precision("rowwise")
        monitor = ClampMonitor(every_n_steps=4, dirpath=tmp_path / directory)
        trainer = make_trainer(
            plugin, max_epochs=epochs, callbacks=[monitor, Demote(plugin, after=6)]
        )
        model = language_model(implementation, name)
        trainer.fit(model, loader, **options)
        return model, trainer

    whole, _ = run("whole", 2)
    first, trainer = run("first", 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second, trainer = run("second", 2, ckpt_path=tmp_path / "last.ckpt")
    assert first.losses + second.losses == whole.losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    formats = trainer.precision_plugin.precision_map.formats()
    assert (formats[FIRST], formats[SECOND]) == ("bf16", "fp8-rowwise")
    assert formats[f"{SECOND}[2]"] == "bf16"
    rows = read_statistics(tmp_path / "whole").to_pylist()
    assert {row["format"] for row in rows if row["layer"] == FIRST} == {"fp8-rowwise"}
    mine = [row for row in rows if row["layer"] == SECOND]
    assert {row["operand"] for row in mine} >= {"input", "weight", "grad_output"}
    assert all(row["nonfinite"] == 0 for row in mine)
    page = write_report([tmp_path / "whole"], tmp_path / "report.html").read_text()
    assert FIRST in page
    assert f"{SECOND}[2]" in page


class BrokenExperts(ForwardCorruption):
    """Noise in what one layer's experts return, while their format is FP8."""

    def install(self, model: nn.Module, owner: Any) -> None:
        self._owner = owner
        self._start_clock(model)
        experts: Any = model.get_submodule(self.layers)
        self.attach(self.layers, experts)


@pytest.mark.slow
def test_the_fallback_finds_the_experts_at_fault(tmp_path: Path) -> None:
    fallback = PrecisionFallback(
        detector=DivergenceDetector(armed=16), snapshot_every_n_steps=8, dirpath=tmp_path
    )
    plugin = FP8Precision("rowwise", base="32-true")
    broken = BrokenExperts(FIRST, kind="noise", strength=20, start=24)
    fit(plugin, language_model(), max_steps=35, callbacks=[broken, fallback])
    events = read_events(tmp_path)
    rehearsed = [event for event in events if isinstance(event, Rehearsed)]
    assert [event.outcome for event in rehearsed] == ["passed"]
    demoted = {name for event in events if isinstance(event, Demotion) for name in event.formats}
    assert demoted == {FIRST}
    assert plugin.precision_map.formats()[SECOND] == "fp8-rowwise"


@pytest.mark.slow
def test_experts_over_a_limit_climb_and_others_stay(tmp_path: Path) -> None:
    model = Logits("eager")
    with torch.no_grad():  # a channel of outliers: a scale per tensor makes all others zero
        model.model.model.layers[0].mlp.experts.down_proj[:, :, 0] *= 1e6
        model.model.model.layers[0].mlp.experts.gate_up_proj[:, 0] *= 1e-6
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    armed = DivergenceDetector(armed=16)
    watch = {"limit": LayerLimit(patience=2), "every_n_steps": 1, "detector": armed}
    loop = PrecisionLoop(model, optimizer, "fp8-dynamic", fallback=watch, dirpath=tmp_path)
    for batch in text_loader(160):
        loop.step(lambda batch: next_byte_loss(model, batch), batch)
    climbed = {change.layer for change in loop.precision_map.changes}
    assert climbed == {"model.model.layers.0.mlp.experts"}
    reasons = [change.reason for change in loop.precision_map.changes]
    assert reasons[0].startswith("underflow of weight is ")
