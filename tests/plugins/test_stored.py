"""Frozen weights kept as FP8 alone, in a Trainer: PEFT's adapters, checkpoints, the fallback."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from peft import LoraConfig, get_peft_model
from torch import nn

import lightning_fp
from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from lightning_fp.layers.stored import is_stored
from lightning_fp.records import read_events
from tests.helper import LanguageModel, TinyGPT, fit, make_trainer, same_weights, text_loader


def adapted() -> LanguageModel:
    """A frozen GPT with LoRA beside its MLPs."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["fc1", "fc2"], init_lora_weights="gaussian")
    return LanguageModel(get_peft_model(TinyGPT(), config))  # pyright: ignore


def frozen_layers(module: nn.Module) -> list[nn.Module]:
    return [m for n, m in module.named_modules() if n.endswith("base_layer")]


def stored() -> FP8Precision:
    return FP8Precision("dynamic", frozen="stored")


def test_a_run_with_peft_is_the_run_of_whole_weights() -> None:
    plugin = stored()
    kept = fit(plugin, adapted(), max_steps=6)
    whole = fit(FP8Precision("dynamic"), adapted(), max_steps=6)
    assert plugin.report is not None
    assert len(plugin.report.stored) == 4 + 2 * 2  # the base layers, and qkv and proj, frozen too
    assert all(map(is_stored, frozen_layers(kept)))
    trained = {n for n, p in whole.named_parameters() if p.requires_grad}
    a, b = dict(kept.named_parameters()), dict(whole.named_parameters())
    assert trained
    assert all(torch.equal(a[name], b[name]) for name in trained)


def test_peft_merges_after_unstore() -> None:
    model = fit(stored(), adapted(), max_steps=3)
    with pytest.raises(ValueError, match=r"fc1.base_layer': .*lightning_fp.unstore\(model, "):
        model.model.merge_and_unload()
    assert lightning_fp.unstore(model) == 8
    x = torch.randint(0, 256, (2, 16))
    model.eval()
    expected = model(x)
    model.model = model.model.merge_and_unload()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    whole = fit(stored(), adapted(), max_epochs=2, max_steps=-1, loader=text_loader(32))
    half = make_trainer(stored(), max_epochs=1)
    half.fit(adapted(), text_loader(32))
    half.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    plain = adapted()
    plain.load_state_dict(state)
    assert all(p.dtype is torch.float32 for p in plain.parameters())
    resumed = adapted()
    trainer = make_trainer(stored(), max_epochs=2)
    trainer.fit(resumed, text_loader(32), ckpt_path=path)
    assert same_weights(whole, resumed)
    evaluated = make_trainer(None)
    (one,), (other,) = (
        evaluated.validate(model, text_loader(8), verbose=False) for model in (whole, resumed)
    )
    assert one == other


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.model.blocks)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.blocks, optimizer)


def test_a_callback_that_unfreezes_is_told_the_layer() -> None:
    trainer = make_trainer(stored(), max_epochs=2, callbacks=[Unfreeze()])
    with pytest.raises(ValueError, match=r"blocks.0.qkv': its weight cannot be trained.*unstore\("):
        trainer.fit(LanguageModel(), text_loader(8))


def test_the_watch_says_what_it_cannot_heal(tmp_path: Path) -> None:
    callbacks = [ClampMonitor(dirpath=tmp_path), PrecisionFallback(dirpath=tmp_path)]
    model = fit(stored(), adapted(), max_steps=20, callbacks=callbacks)
    assert all(map(is_stored, frozen_layers(model)))
    said = [event.reason for event in read_events(tmp_path) if "only in FP8" in event.reason]
    assert said == [
        "8 frozen layers keep their weights only in FP8: high precision, in replays and after a"
        " fallback, computes with the rounded weights and cannot undo what rounding did"
    ]
