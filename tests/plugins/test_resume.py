"""Interrupted and resumed equals uninterrupted, bit for bit; checkpoints stay everyone's."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_fp import FP8Precision
from lightning_fp.plugins.base import STATE_KEY
from tests.helper import LanguageModel, TinyGPT, make_trainer, same_weights, text_loader, text_rows

# torchdata's import of torch's own data loader
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

STEPS_PER_EPOCH = 20
WRITES = {
    2: ("*.fc1", "fp8-rowwise-gw-hp"),
    5: ("*.blocks.0.*", "bf16"),
    # pending when the checkpoints below are saved
    12: ("*.blocks.1.proj", "e8m3"),
    19: ("*.lm_head", "fp8-dynamic"),
    25: ("*.fc2", "fp32"),
}


class Writer(L.Callback):
    """Changes formats after fixed steps, notes those of every step, and saves a checkpoint."""

    def __init__(self, save_after: int | None = None, path: Path | None = None) -> None:
        self.save_after, self.path = save_after, path
        self.formats: dict[int, dict[str, str]] = {}

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        self.formats[trainer.global_step] = trainer.precision_plugin.precision_map.formats()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step - 1
        if step in WRITES:
            trainer.precision_plugin.precision_map.set(*WRITES[step], reason=f"after {step}")
        if step == self.save_after and self.path is not None:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.save_after is None and self.path is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Scheduled(LanguageModel):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS_PER_EPOCH)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def stateful_loader() -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(text_rows(4 * STEPS_PER_EPOCH), batch_size=4)


def run(writer: Writer, loader: Any, *, ckpt: Path | None = None, plugin: Any = None, **opts: Any):
    model = Scheduled()
    plugin = FP8Precision(**opts) if plugin is None else plugin
    trainer = make_trainer(plugin, max_epochs=2, callbacks=[writer])
    trainer.fit(model, loader, ckpt_path=ckpt)
    return model, plugin, trainer


@pytest.mark.parametrize("scaling", ["dynamic", "rowwise", "e8m3-stochastic"])
@pytest.mark.parametrize("loader", ["stateful", "plain"])
def test_resuming_is_bit_equal(tmp_path: Path, loader: str, scaling: str) -> None:
    mid_epoch = loader == "stateful"
    make = stateful_loader if mid_epoch else lambda: text_loader(4 * STEPS_PER_EPOCH)
    path, saved_after = tmp_path / "last.ckpt", 12 if mid_epoch else STEPS_PER_EPOCH - 1
    whole = Writer(12 if mid_epoch else None, path)
    expected, expected_plugin, trainer = run(whole, make(), scaling=scaling)
    assert trainer.global_step == len(expected.losses) == 2 * STEPS_PER_EPOCH

    state = torch.load(path, weights_only=True)
    assert state["global_step"] == saved_after + 1
    assert [write["pattern"] for write in state[STATE_KEY]["pending"]] == [WRITES[saved_after][0]]

    rest = Writer()
    model, plugin, trainer = run(rest, make(), ckpt=path, scaling=scaling)
    assert trainer.global_step == 2 * STEPS_PER_EPOCH
    assert model.losses == expected.losses[saved_after + 1 :]
    assert same_weights(model, expected)
    assert plugin.precision_map.formats() == expected_plugin.precision_map.formats()
    assert rest.formats == {s: f for s, f in whole.formats.items() if s > saved_after}
    assert len({str(formats) for formats in whole.formats.values()}) == 1 + len(WRITES)


def checkpoint(tmp_path: Path, plugin: Any, writer: Writer | None = None) -> tuple[Path, Any]:
    path = tmp_path / "one.ckpt"
    model = Scheduled()
    callbacks = None if writer is None else [writer]
    trainer = make_trainer(plugin, max_epochs=1, callbacks=callbacks)
    trainer.fit(model, text_loader(4 * STEPS_PER_EPOCH))
    trainer.save_checkpoint(path)
    return path, model


def test_a_checkpoint_is_plain_and_its_weights_are_the_plain_models(tmp_path: Path) -> None:
    plugin = FP8Precision()
    path, model = checkpoint(tmp_path, plugin, Writer())
    loaded = torch.load(path, weights_only=True)
    assert loaded[STATE_KEY]["formats"] == plugin.precision_map.formats()
    plain = TinyGPT()
    weights = {k.removeprefix("model."): v for k, v in loaded["state_dict"].items()}
    plain.load_state_dict(weights, strict=True)
    assert same_weights(plain, model.model)
    assert same_weights(LanguageModel.load_from_checkpoint(path), model)


def test_the_state_of_the_optimizer_is_lightnings(tmp_path: Path) -> None:
    plugins = {
        "fp8": FP8Precision(),
        "high": FP8Precision("high"),
        "plain": MixedPrecision("bf16-mixed", "cpu"),
    }
    paths = []
    for name, plugin in plugins.items():
        (tmp_path / name).mkdir()
        paths.append(checkpoint(tmp_path / name, plugin)[0])
    ours, high, theirs = (torch.load(path, weights_only=True) for path in paths)
    assert set(ours) - set(theirs) == {STATE_KEY}
    assert list(high) == list(theirs)
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for one, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert one["state"].keys() == other["state"].keys()
        assert one["param_groups"] == other["param_groups"]


def test_a_plain_checkpoint_resumes_into_fp8(tmp_path: Path) -> None:
    path, plain = checkpoint(tmp_path, MixedPrecision("bf16-mixed", "cpu"))
    writer = Writer()
    model, plugin, trainer = run(writer, text_loader(4 * STEPS_PER_EPOCH), ckpt=path)
    assert trainer.global_step == 2 * STEPS_PER_EPOCH
    assert min(writer.formats) == STEPS_PER_EPOCH
    assert plugin.precision_map.formats()["model.blocks.0.fc1"] == "fp8-dynamic"
    assert sum(model.losses) < sum(plain.losses)
    # exactly what a run does that starts from these weights
    twin, _, _ = run(Writer(), text_loader(4 * STEPS_PER_EPOCH), ckpt=path)
    assert same_weights(twin, model)


def test_an_fp8_checkpoint_resumes_into_plain(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, FP8Precision())
    models = []
    # Lightning's plugin, and ours with every layer in high precision, go on alike
    for plugin in (MixedPrecision("bf16-mixed", "cpu"), FP8Precision(layers={"*": "bf16"})):
        model = Scheduled()
        trainer = make_trainer(plugin, max_epochs=2)
        trainer.fit(model, text_loader(4 * STEPS_PER_EPOCH), ckpt_path=path)
        assert trainer.global_step == 2 * STEPS_PER_EPOCH
        models.append(model)
    assert models[0].losses == models[1].losses
    assert same_weights(*models)


def test_a_changed_configuration_wins_on_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FlipOnce(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.precision_plugin.precision_map.set("*.blocks.1.*", "e8m3")

    path = tmp_path / "one.ckpt"
    trainer = make_trainer(FP8Precision(), max_epochs=1, callbacks=[FlipOnce()])
    trainer.fit(Scheduled(), text_loader(40))
    trainer.save_checkpoint(path)
    plugin = FP8Precision(layers={"*.fc1": "fp8-rowwise"})
    with caplog.at_level(logging.WARNING, "lightning_fp"):
        make_trainer(plugin, max_epochs=2).fit(Scheduled(), text_loader(40), ckpt_path=path)
    assert "2 of 9 layers keep their configured format" in caplog.text
    formats = plugin.precision_map.formats()
    assert formats["model.blocks.0.fc1"] == formats["model.blocks.1.fc1"] == "fp8-rowwise"
    assert formats["model.blocks.0.fc2"] == "fp8-dynamic"
    assert formats["model.blocks.1.fc2"] == "e8m3"


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, FP8Precision())
    state = torch.load(path, weights_only=True)
    state[STATE_KEY]["version"] = 99
    torch.save(state, path)
    message = "precision map state must have version 1, got 99"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(Writer(), text_loader(80), ckpt=path)
