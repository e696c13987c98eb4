"""When layers run in FP8 and when in high precision, and when writes take effect."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision
from tests.helper import LanguageModel, fit, make_trainer, text_loader


class Watch(L.LightningModule):
    """Notes for every forward of a layer whether it ran in FP8, and in which hook of the step."""

    def __init__(self, *, freeze: bool = False, recompute: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.layer = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.freeze, self.recompute = freeze, recompute
        self.seen: dict[str, list[tuple[bool, bool]]] = {}
        self.hook = ""

    def run(self, name: str, layer: Any, x: Tensor) -> Tensor:
        output = layer(x)
        with torch.no_grad():
            plain = F.linear(x, layer.weight, layer.bias)
        self.seen.setdefault(self.hook, []).append((name, not torch.equal(output, plain)))
        return output

    def forward(self, x: Tensor) -> Tensor:
        return self.run("layer", self.layer, self.run("frozen", self.frozen, x))

    def on_train_start(self) -> None:
        if self.freeze:
            self.frozen.eval()
            self.frozen.requires_grad_(False)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.hook = "train"
        x = torch.randn(8, 32, requires_grad=True)
        if self.recompute is not None:
            output = checkpoint(self, x, use_reentrant=self.recompute == "reentrant")
        else:
            output = self(x)
        self.hook = "backward"
        return output.square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.hook = "validate"
        self(torch.randn(7, 32))

    def test_step(self, batch: Tensor, index: int) -> None:
        self.hook = "test"
        self(torch.randn(7, 32))

    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        self.hook = "predict"
        return self(torch.randn(7, 32))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def in_fp8(self, hook: str) -> dict[str, bool]:
        """Whether each layer ran in FP8 there; always the same, or this fails."""
        found = {name: fp8 for name, fp8 in self.seen[hook]}
        assert all(found[name] == fp8 for name, fp8 in self.seen[hook]), self.seen[hook]
        return found


BOTH = {"frozen": True, "layer": True}
NEITHER = {"frozen": False, "layer": False}


def run_fit(model: Watch, *, callbacks: Any = None, **options: Any) -> L.Trainer:
    plugin = FP8Precision(base="32-true", **options)
    trainer = make_trainer(
        plugin, max_steps=3, val_check_interval=1, limit_val_batches=2, callbacks=callbacks
    )
    trainer.fit(model, text_loader(40), text_loader(8))
    return trainer


@pytest.mark.parametrize("freeze", [False, True])
def test_training_is_fp8_and_evaluation_is_not(freeze: bool) -> None:
    model = Watch(freeze=freeze)
    trainer = run_fit(model)
    trainer.test(model, text_loader(8), verbose=False)
    trainer.predict(model, text_loader(8))
    assert model.in_fp8("train") == BOTH
    assert {hook: model.in_fp8(hook) for hook in ("validate", "test", "predict")} == {
        "validate": NEITHER,
        "test": NEITHER,
        "predict": NEITHER,
    }


@pytest.mark.parametrize("hook", ["validate", "test", "predict"])
def test_fp8_eval_evaluates_in_fp8(hook: str) -> None:
    model = Watch()
    trainer = run_fit(model, fp8_eval=True)
    trainer.test(model, text_loader(8), verbose=False)
    trainer.predict(model, text_loader(8))
    assert model.in_fp8(hook) == BOTH


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_a_frozen_eval_submodule_is_recomputed_in_fp8(recompute: str) -> None:
    model = Watch(freeze=True, recompute=recompute)
    run_fit(model)
    assert model.in_fp8("train") == BOTH
    # The recomputation stops as soon as it has what backward needs, before the last layer ends.
    recomputed = model.in_fp8("backward")
    assert recomputed == {name: True for name in recomputed}
    assert "frozen" in recomputed


def test_after_fit_the_training_flag_decides() -> None:
    model = Watch()
    run_fit(model)
    for training, expected in ((False, NEITHER), (True, BOTH)):
        model.train(training)
        model.hook = f"after-{training}"
        model(torch.randn(8, 32))
        assert model.in_fp8(model.hook) == expected


def test_sampling_between_steps_is_high_precision() -> None:
    class Sample(L.Callback):
        def sample(self, module: Watch, hook: str) -> None:
            module.hook = hook
            training = module.training
            module.eval()
            with torch.no_grad():
                module(torch.randn(5, 32))
            module.train(training)

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.sample(module, "batch start")

        def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
            self.sample(module, "before optimizer step")

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.sample(module, "batch end")

    model = Watch()
    run_fit(model, callbacks=[Sample()])
    for hook in ("batch start", "before optimizer step", "batch end"):
        assert model.in_fp8(hook) == NEITHER
    assert model.in_fp8("train") == BOTH


def test_an_exception_in_a_step_leaves_no_phase_behind() -> None:
    class Breaks(Watch):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            super().training_step(batch, index)
            raise RuntimeError("broken")

    model = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        run_fit(model)
    model.eval()
    model.hook = "after"
    model(torch.randn(8, 32))
    assert model.in_fp8("after") == NEITHER


# -- boundaries --------------------------------------------------------------------------------


class Formats(L.Callback):
    """Notes the format of one layer at every batch; writes at one of them."""

    def __init__(self, write_at: int, where: str) -> None:
        self.write_at, self.where, self.formats = write_at, where, []

    def write(self, trainer: Any, index: int, where: str) -> None:
        if (index, where) == (self.write_at, self.where):
            trainer.precision_plugin.precision_map.set("*.fc1", "bf16", reason="test")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.write(trainer, index, "start")

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        self.formats.append(module.model.blocks[0].fc1.format.name)
        self.write(trainer, len(self.formats) - 1, "backward")

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        self.write(trainer, i, "end")


@pytest.mark.parametrize(
    ("write_at", "where", "first"),
    [
        (3, "start", 3),  # a boundary: before the first micro-batch
        (3, "backward", 6),  # amid a step: waits for its end
        (3, "end", 6),
        (4, "start", 6),
        (5, "end", 6),
    ],
)
def test_writes_amid_accumulation_wait_for_the_boundary(
    write_at: int, where: str, first: int
) -> None:
    callback = Formats(write_at, where)
    fit(FP8Precision(), max_steps=3, accumulate_grad_batches=3, callbacks=[callback])
    assert callback.formats == ["fp8-dynamic"] * first + ["bf16"] * (9 - first)


@pytest.mark.parametrize(("where", "first"), [("start", 2), ("backward", 3), ("end", 3)])
def test_writes_without_accumulation_take_effect_at_the_next_step(where: str, first: int) -> None:
    callback = Formats(2, where)
    fit(FP8Precision(), max_steps=5, callbacks=[callback])
    assert callback.formats == ["fp8-dynamic"] * first + ["bf16"] * (5 - first)


def test_a_write_before_the_fit_takes_effect_at_its_first_step() -> None:
    plugin, callback = FP8Precision(), Formats(99, "")
    plugin.precision_map.set("*.fc1", "bf16")
    fit(plugin, max_steps=2, callbacks=[callback])
    assert callback.formats == ["bf16", "bf16"]


def test_the_reason_is_kept() -> None:
    plugin = FP8Precision()
    fit(plugin, LanguageModel(), max_steps=5, callbacks=[Formats(2, "end")])
    assert [(c.layer, c.before, c.after, c.reason) for c in plugin.precision_map.changes] == [
        (f"model.blocks.{i}.fc1", "fp8-dynamic", "bf16", "test") for i in range(2)
    ]


@pytest.mark.parametrize("scaling", ["rowwise", "rowwise-gw-hp", "delayed", "mxfp8"])
def test_a_mixer_evaluates_in_its_formats(scaling: str) -> None:
    """Its token layers see transposed inputs, and Lightning evaluates in inference mode."""

    class Mixer(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.channels = torch.nn.Linear(16, 16), torch.nn.Linear(32, 32)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            hidden = batch + self.tokens(batch.mT).mT
            hidden += self.channels(hidden)
            return hidden.float().square().mean()

        validation_step = test_step = training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = make_trainer(FP8Precision(scaling, fp8_eval=True), max_epochs=1)
    loader = DataLoader(torch.randn(4, 8, 16, 32), batch_size=None)
    model = Mixer()
    trainer.fit(model, loader, loader)
    trainer.test(model, loader, verbose=False)
    assert trainer.global_step == 4
