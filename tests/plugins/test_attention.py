"""Attention's products in a simulated format, as an option: in every loop the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_fp.fabric
from lightning_fp import FP8Precision
from lightning_fp.events import Rehearsed
from lightning_fp.layers import PrecisionMap, simulated_attention
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events
from tests.helper import (
    LanguageModel,
    TinyGPT,
    make_trainer,
    next_byte_loss,
    text_loader,
    text_rows,
)

FORMAT = "e8m2"
STEPS = 4


class ByHand(nn.Module):
    """A GPT that enters the context itself, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = gpt()

    def forward(self, tokens: Tensor) -> Tensor:
        with simulated_attention(FORMAT if self.training else "high"):
            return self.gpt(tokens)


class Again(nn.Module):
    """A GPT whose blocks are computed again in backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.gpt = gpt()
        for block in self.gpt.blocks:
            block.forward = _again(block.forward, reentrant)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)


def _again(forward: Any, reentrant: bool) -> Any:
    def again(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x)
        return checkpoint(forward, x, use_reentrant=reentrant)

    return again


def gpt() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT()


def fit(model: nn.Module, attention: str | None, **options: Any) -> LanguageModel:
    module = LanguageModel(model)
    plugin = FP8Precision("dynamic", base="32-true", attention=attention, **options)
    trainer = make_trainer(plugin, max_epochs=1)
    trainer.fit(module, text_loader(4 * STEPS), text_loader(4))
    return module


def in_a_loop(model: nn.Module, attention: str | None) -> tuple[list[float], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loop = PrecisionLoop(model, optimizer, "dynamic", base="32-true", attention=attention)
    rows = text_rows().split(4)
    compute = lambda batch: next_byte_loss(model, batch)  # noqa: E731
    losses = [float(loop.step(compute, batch)) for batch in rows[:STEPS]]
    with loop.evaluation():
        held_out = float(compute(rows[-1]))
    loop.close()
    return losses, held_out


def in_fabric(model: nn.Module, attention: str | None) -> tuple[list[float], float]:
    plugin = lightning_fp.fabric.FP8Precision("dynamic", base="32-true", attention=attention)
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses: list[float] = []
    rows = text_rows().split(4)
    for batch in rows[:STEPS]:
        loss = next_byte_loss(module, batch)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    module.eval()
    with torch.no_grad():
        return losses, float(next_byte_loss(module, rows[-1]))


def test_it_is_the_context_around_training_alone() -> None:
    by_hand, plain = fit(ByHand(), None), fit(gpt(), None)
    asked = fit(gpt(), FORMAT)
    assert asked.losses == by_hand.losses
    assert asked.val_losses == by_hand.val_losses
    assert asked.losses[0] != plain.losses[0]
    everywhere = fit(gpt(), FORMAT, fp8_eval=True)
    assert everywhere.losses == asked.losses
    assert len(everywhere.val_losses) == 1
    assert everywhere.val_losses != fit(ByHand(), None, fp8_eval=True).val_losses


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_in_backward_is_in_the_format(reentrant: bool) -> None:
    again, alone = fit(Again(reentrant=reentrant), FORMAT), fit(gpt(), FORMAT)
    assert again.losses == alone.losses
    assert in_a_loop(Again(reentrant=reentrant), FORMAT)[0] == in_a_loop(gpt(), FORMAT)[0]
    assert in_fabric(Again(reentrant=reentrant), FORMAT)[0] == in_fabric(gpt(), FORMAT)[0]


@pytest.mark.parametrize("train", [in_a_loop, in_fabric])
def test_other_loops_do_the_same(train: Any) -> None:
    asked = train(gpt(), FORMAT)
    assert asked == train(ByHand(), None)
    assert asked != train(gpt(), None)


@pytest.mark.slow
def test_compiled_and_replayed(tmp_path: Path) -> None:
    alone = in_a_loop(gpt(), FORMAT)[0]
    torch._dynamo.reset()
    compiled = gpt()
    compiled.compile(backend="aot_eager")
    torch.testing.assert_close(in_a_loop(compiled, FORMAT)[0], alone, rtol=1e-4, atol=0.0)
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with PrecisionLoop(model, optimizer, attention=FORMAT, dirpath=tmp_path) as loop:
        for batch in text_rows().split(4)[:8]:
            loop.step(lambda batch: next_byte_loss(model, batch), batch)
    (event,) = read_events(tmp_path, kinds=["rehearsal"])
    assert isinstance(event, Rehearsed)
    assert event.outcome == "passed"


def test_the_report_and_the_settings_say_so() -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters())
    loop = PrecisionLoop(model, optimizer, "dynamic", attention="e8m3-truncate")
    assert loop.conversion is not None
    assert "e8m3-truncate: attention's products, kernel simulated" in str(loop.conversion)
    assert loop.conversion.to_dict()["attention"] == "e8m3-truncate"
    assert loop._precision.settings()["attention"] == "e8m3-truncate"
    assert FP8Precision(attention="e8m3").settings()["attention"] == "e8m3"
    for none in (None, "bf16"):
        assert "attention" not in FP8Precision(attention=none).settings()


def test_what_never_was_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    loop = PrecisionLoop(model, torch.optim.SGD(model.parameters(), 0.1), attention=FORMAT)
    loop.step(lambda x: model(x).square().mean(), torch.randn(8, 32))
    loop.close()
    assert "attention was to be in e8m2 and never was" in caplog.text
    caplog.clear()
    fit(gpt(), FORMAT)
    assert "never was" not in caplog.text


@pytest.mark.parametrize("format", ["fp8-dynamic", "mxfp8"])
def test_what_attention_cannot_be_in_is_refused(format: str) -> None:
    with pytest.raises(ValueError, match=f"attention must be a simulated one, .* got '{format}'"):
        FP8Precision(attention=format)


def test_by_chance_it_resumes_too() -> None:
    table = PrecisionMap(attention="e8m3-stochastic")
    before = torch.get_rng_state()
    table.before_batch()
    assert not torch.equal(torch.get_rng_state(), before)
