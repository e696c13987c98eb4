"""Log-probabilities at unchanged weights are those of the training forward, bit for bit."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import FP8Precision, FP16Precision
from lightning_fp.plugins import LayerPrecision
from tests.helper import LanguageModel, fit, same_weights

FORMATS = ["dynamic", "delayed", "rowwise", "rowwise-gw-hp", "block", "mx", "auto", "e8m3", "bf16"]


class Ratios(L.Callback):
    """Asks before each step what the training forward will say."""

    def __init__(self) -> None:
        self.old: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Tensor, batch_idx: int
    ) -> None:
        plugin = trainer.precision_plugin
        assert isinstance(plugin, LayerPrecision)
        with plugin.as_trained(), torch.no_grad():
            self.old = pl_module(plugin.convert_input(batch[:, :-1])).float().log_softmax(-1)
        assert pl_module.training


class Policy(LanguageModel):
    """A policy whose training forward drops out nothing."""

    def __init__(self, ratios: Ratios) -> None:
        super().__init__(dropout=0.3)
        self.ratios, self.worst = ratios, 0.0

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        for block in self.model.blocks:
            block.dropout = 0.0
        logprobs = self(batch[:, :-1]).float().log_softmax(-1)
        for block in self.model.blocks:
            block.dropout = 0.3
        assert self.ratios.old is not None
        self.worst = max(self.worst, float((logprobs.detach() - self.ratios.old).abs().max()))
        chosen = logprobs.gather(2, batch[:, 1:].unsqueeze(2))
        return -chosen.mean()


@pytest.mark.parametrize("scaling", FORMATS)
def test_ratios_are_one_at_unchanged_weights(scaling: Any) -> None:
    ratios = Ratios()
    asked = fit(FP8Precision(scaling), Policy(ratios), max_steps=4, callbacks=[ratios])
    assert asked.worst == 0.0


@pytest.mark.parametrize("base", ["16-mixed", "16-true"])
def test_in_fp16_too(base: Any) -> None:
    ratios = Ratios()
    assert fit(FP16Precision(base), Policy(ratios), max_steps=4, callbacks=[ratios]).worst == 0.0


def test_asking_changes_nothing() -> None:
    class Asks(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: Any, batch: Tensor, batch_idx: int
        ) -> None:
            with trainer.precision_plugin.as_trained():  # pyright: ignore
                pl_module(batch[:, :-1] // 2)

    plugins = [FP8Precision("delayed"), FP8Precision("delayed")]
    asked = fit(plugins[0], max_steps=5, callbacks=[Asks()])
    assert same_weights(asked, fit(plugins[1], max_steps=5))
    states = [str(plugin.precision_map.state_dict()) for plugin in plugins]
    assert states[0] == states[1]


def test_before_there_is_a_model() -> None:
    with pytest.raises(ValueError, match="as_trained needs a model"):
        FP8Precision().as_trained()
