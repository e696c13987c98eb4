"""A model that has been in a Trainer of ours, in the next Trainer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_fp import FP8Precision, convert
from lightning_fp.layers import FPLinear
from tests.helper import LanguageModel, fit, make_trainer, same_weights, text_loader

LOW = 4
"""Layers of one block, which the defaults convert."""


class Converts(LanguageModel):
    """Converts itself in `configure_model`, as the quick start has it for FSDP2."""

    format = "fp8-dynamic"

    def configure_model(self) -> None:
        if not any(isinstance(module, FPLinear) for module in self.modules()):
            convert(self, self.format)


def errors(model: LanguageModel, times: float) -> float:
    """Of a layer's product in a training forward, on inputs that are larger by `times`."""
    layer = model.model.blocks[0].fc1
    x = torch.randn(8, 32) * times
    layer.phase.evaluating = False
    want = F.linear(x, layer.weight, layer.bias)
    found = ((layer(x) - want).norm() / want.norm()).item()
    layer.phase.evaluating = None
    return found


def test_a_trainer_without_the_plugin_trains_as_if_it_had_never_been_there() -> None:
    ours, plain = LanguageModel(blocks=1), LanguageModel(blocks=1)
    fit(FP8Precision("delayed"), ours, max_steps=3)
    plain.load_state_dict(ours.state_dict())
    ours.losses.clear()
    for model in (ours, plain):
        trainer = make_trainer(None, precision="bf16-mixed", max_steps=3)
        trainer.fit(model, text_loader(40))
    assert ours.losses == plain.losses
    assert same_weights(ours, plain)
    back = fit(FP8Precision("delayed"), ours, max_steps=3)
    assert back.losses[-1] != plain.losses[-1]


def test_in_a_loop_of_ones_own_the_formats_stay_and_copies_begin_anew() -> None:
    x = text_loader(4).dataset[:4, :-1]
    model = fit(FP8Precision("dynamic"), LanguageModel(blocks=1), max_steps=1)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.train()
        low = each(x)
        each.eval()
        assert not torch.equal(each(x), low)


@pytest.mark.parametrize("first", ["delayed", "dynamic", "auto"])
@pytest.mark.parametrize("second", ["delayed", "auto"])
def test_a_second_plugin_has_the_layers(first: str, second: str) -> None:
    options: dict[str, Any] = {"tokens": 1e9}
    plugins = [FP8Precision(s, **(options if s == "auto" else {})) for s in (first, second)]
    model = LanguageModel(blocks=1)
    for plugin in plugins:
        fit(plugin, model, max_steps=20)
    earlier, later = (plugin.precision_map for plugin in plugins)
    assert (len(earlier.layers), len(later.layers)) == (0, LOW + 1)
    assert len(later.scale_history) == LOW
    checkpoint: dict[str, Any] = {}
    plugins[1].on_save_checkpoint(checkpoint)
    scales = checkpoint["lightning_fp.precision"]["scales"]
    assert len(scales["layers"]) == LOW
    assert errors(model, 1.0) < 0.06


@pytest.mark.parametrize("scaling", ["delayed", "auto"])
@pytest.mark.parametrize("before", ["fp8-dynamic", "fp8-delayed"])
def test_a_model_that_converts_itself_gets_the_plugins_formats(before: str, scaling: str) -> None:
    model, twin = Converts(blocks=1), LanguageModel(blocks=1)
    model.format = before
    plugins = [FP8Precision(scaling), FP8Precision(scaling)]
    for plugin, each in zip(plugins, (model, twin), strict=True):
        fit(plugin, each, max_steps=6)
    assert len(plugins[0].precision_map.scale_history) == LOW
    assert plugins[0].precision_map.formats() == plugins[1].precision_map.formats()
    assert model.losses == twin.losses
