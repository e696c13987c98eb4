"""FP16 training: the loss scale's course, skipped steps, float32 masters, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fp import FP8Precision, precision_plugin
from lightning_fp.plugins import FP16Precision
from lightning_fp.plugins.base import STATE_KEY
from lightning_fp.stability.loss_scaling import LossScaleError, LossScaling
from tests.helper import LanguageModel, fit, make_trainer, same_weights, text_loader

QUICK = LossScaling(init_scale=2.0**20, growth_interval=3, hysteresis=1)
"""Overflows at first, and grows into overflow again after a few steps."""


class Watched(LanguageModel):
    """Remembers scale, rates and gradient norms, with a scheduler that counts."""

    def __init__(self, optimizer: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.rates: list[float] = []
        self.scales: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            state = getattr(scaler, "state", None)
            self.scales.append(float(scaler.get_scale() if state is None else state.scale))
        return super().training_step(batch, index)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ],
)
def test_the_course_is_that_of_torchs_grad_scaler(options: dict[str, Any]) -> None:
    torchs = torch.amp.GradScaler(  # pyright: ignore
        "cpu", init_scale=QUICK.init_scale, growth_interval=3
    )
    options = {**options, "max_steps": 12}
    theirs = fit(MixedPrecision("16-mixed", "cpu", scaler=torchs), Watched(), **options)
    plugin = FP16Precision(loss_scaling=QUICK, hold_schedulers=False)
    ours = fit(plugin, Watched(), **options)
    assert ours.scales == theirs.scales
    assert len(set(ours.scales)) > 3
    assert same_weights(ours, theirs)
    assert ours.rates == theirs.rates
    assert plugin.scaler is not None
    assert float(plugin.scaler.state.scale) == torchs.get_scale()


def test_schedulers_wait_and_skips_are_counted() -> None:
    plugin = FP16Precision(loss_scaling=QUICK)
    model = fit(plugin, Watched(), max_steps=10)
    assert plugin.scaler is not None
    state = plugin.scaler.state.numbers()
    falls = sum(b < a for a, b in zip(model.scales, model.scales[1:], strict=False))
    assert state["skipped"] >= falls > 1
    assert state["made"] + state["skipped"] == 10
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        1e-2 * 0.9 ** state["made"]
    )


def test_hooks_see_gradients_without_the_scale() -> None:
    calm = LossScaling(init_scale=2.0**12)
    half = fit(FP16Precision(loss_scaling=calm), Watched(), max_steps=2)
    full = Watched()
    make_trainer(None, max_steps=2, precision="32-true").fit(full, text_loader())
    assert half.norms == pytest.approx(full.norms, rel=0.05)


def test_the_scale_is_logged_at_every_interval(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    plugin = FP16Precision(loss_scaling=QUICK)
    model = Watched()
    make_trainer(plugin, max_steps=6, logger=logger, log_every_n_steps=2).fit(model, text_loader())
    logger.save()
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 3, 5]
    scales = [float(row["fp16/loss_scale"]) for row in rows]
    assert scales[:2] == [model.scales[2], model.scales[4]]
    counts = [float(row["fp16/skipped_steps"]) + float(row["fp16/effective_steps"]) for row in rows]
    assert counts == [2, 4, 6]


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}])
@pytest.mark.parametrize("base", ["16-mixed", "bf16-mixed"])
def test_lightnings_ways_to_switch_logging_off(base: Any, options: dict[str, Any]) -> None:
    plugin = FP16Precision(base) if base == "16-mixed" else FP8Precision("delayed", base=base)
    model = LanguageModel()
    plain = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False}
    quiet = {**plain, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "max_steps": 3} if "barebones" in options else quiet
    trainer = L.Trainer(**given, **options, plugins=plugin)
    trainer.fit(model, text_loader())
    assert trainer.global_step == 3


class Manual(LanguageModel):
    """Two optimizers, stepped after both backwards; the gradients as they are stepped with."""

    def __init__(self, clip: float = 0.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clip = clip
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> None:  # pyright: ignore
        first, second = self.optimizers()  # pyright: ignore
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        if self.clip:
            self.clip_gradients(first, self.clip)  # before the second backward adds to it
            self.clip_gradients(second, self.clip)
        self.manual_backward(super().training_step(batch, index) * 0.5)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def configure_optimizers(self) -> Any:
        weights = list(self.parameters())
        return torch.optim.SGD(weights[::2], lr=0.1), torch.optim.SGD(weights[1::2], lr=0.1)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_manual_optimization_clips_and_steps_without_the_scale(clip: float) -> None:
    runs = [
        fit(
            FP16Precision(loss_scaling=LossScaling(init_scale=scale, growth_interval=3)),
            m,
            max_steps=8,
        )
        for scale, m in ((1.0, Manual(clip)), (2.0**10, Manual(clip)))
    ]
    small, large = (run.norms for run in runs)
    assert large == pytest.approx(small, rel=2e-2)
    plugin: Any = runs[1].trainer.precision_plugin
    state = plugin.scaler.state.numbers()
    assert state["made"] == 4  # one movement of the scale for each pair of steps
    assert state["scale"] == 2.0**11


def test_what_an_optimizer_accumulates_follows_the_scale() -> None:
    """One optimizer steps in every batch, the other in every fourth, over which the scale grows."""

    class Slow(Manual):
        def training_step(self, batch: Tensor, index: int) -> None:  # pyright: ignore
            first, second = self.optimizers()  # pyright: ignore
            self.manual_backward(LanguageModel.training_step(self, batch, index))
            first.step()
            first.zero_grad()
            if index % 4 == 3:
                second.step()
                second.zero_grad()

    norms = []
    for interval in (None, 1):
        scaling = LossScaling(init_scale=64, min_scale=64, growth_interval=interval)
        norms.append(fit(FP16Precision(loss_scaling=scaling), Slow(), max_steps=10).norms)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


class Dtypes(LanguageModel):
    """Which dtypes norms and linear layers compute in, with recomputation in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.model.lm_head.weight = nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.seen: set[tuple[str, torch.dtype]] = set()
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.register_forward_hook(self.look)
        self.register_buffer("calls", torch.zeros(()))

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.add((type(module).__name__, output.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.model.embed(tokens) + self.model.position.weight[: tokens.shape[1]]
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.model.lm_head(x)


@pytest.mark.parametrize(
    ("base", "norm"), [("16-mixed", torch.float32), ("16-true", torch.float16)]
)
def test_true_fp16_computes_everything_in_it_with_float32_masters(
    base: Any, norm: torch.dtype
) -> None:
    model = Dtypes()
    plugin = FP16Precision(base, loss_scaling=LossScaling(init_scale=2.0**10))
    fit(plugin, model, max_steps=3)
    assert {d for name, d in model.seen if name == "Linear"} == {torch.float16}
    assert {d for name, d in model.seen if name == "LayerNorm"} == {norm}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert float(model.calls) == 3
    states = model.trainer.optimizers[0].state.values()
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    assert plugin.scaler is not None
    assert plugin.scaler.state.numbers()["made"] == 3
    full = fit(None, LanguageModel(), max_steps=3, precision="32-true")
    assert model.losses == pytest.approx(full.losses, rel=2e-3)


def test_true_fp16_validates_and_saves_float32(tmp_path: Path) -> None:
    model = LanguageModel()
    trainer = make_trainer(
        FP16Precision("16-true"), max_epochs=1, limit_train_batches=2, limit_val_batches=1
    )
    trainer.fit(model, text_loader(), text_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {t.dtype for t in saved["state_dict"].values()} == {torch.float32}
    assert len(model.val_losses) == 1
    assert math.isfinite(model.val_losses[-1])


def test_fp8_layers_over_an_fp16_base() -> None:
    plugin = FP8Precision("dynamic", base="16-mixed", loss_scaling=QUICK)
    model = fit(plugin, Watched(), max_steps=8)
    formats = plugin.precision_map.formats()
    assert {formats["model.blocks.0.fc1"], formats["model.lm_head"]} == {"fp8-dynamic", "fp16"}
    assert plugin.scaler is not None
    assert plugin.scaler.state.numbers()["skipped"] > 0
    assert all(map(math.isfinite, model.losses))


def test_a_model_without_linear_layers_trains_in_fp16() -> None:
    class Tiny(LanguageModel):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch.float()[:, None]).square().mean()

    model = Tiny(nn.Conv1d(1, 2, 3))
    plugin = FP16Precision(loss_scaling=LossScaling(init_scale=2.0, min_scale=1.0))
    fit(plugin, model, max_steps=2)
    assert plugin.half_dtype is torch.float16


# -- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused() -> None:
    lbfgs = Watched(optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.raises(ValueError, match="optimizer must not be LBFGS with FP16"):
        fit(FP16Precision(), lbfgs, max_steps=1)
    with pytest.raises(ValueError, match=r"must be float32 with FP16.*Adam's eps"):
        fit(FP16Precision("16-true"), LanguageModel().half(), max_steps=1)
    with pytest.raises(ValueError, match="recurrent layers"):
        fit(FP16Precision("16-true"), LanguageModel(nn.LSTM(8, 8)), max_steps=1)
    with pytest.raises(ValueError, match="base must be '16-mixed' or '16-true'"):
        FP16Precision("bf16-mixed")  # pyright: ignore
    with pytest.raises(ValueError, match="loss_scaling must be None unless the base is"):
        FP8Precision(base="bf16-mixed", loss_scaling=LossScaling())
    with pytest.raises(ValueError, match="base must not be '16-true' with FP8"):
        FP8Precision(base="16-true")
    with pytest.raises(ValueError, match="layers must not be in FP8"):
        FP16Precision("16-true", layers={"*fc1": "fp8-dynamic"})


def test_raise_ends_the_run_at_the_least_scale() -> None:
    static = LossScaling.static(2.0**40, on_min_scale="raise")
    with pytest.raises(LossScaleError, match="overflow at the least loss scale"):
        fit(FP16Precision(loss_scaling=static), Watched(), max_steps=2)


def test_the_name_gives_the_plugin() -> None:
    assert isinstance(precision_plugin("fp16"), FP16Precision)
    settings = FP16Precision(loss_scaling=LossScaling.rl(), layers={"*head": "bf16"}).settings()
    assert settings["loss_scaling"]["growth_interval"] == 400
    assert settings["layers"] == {"*head": "bf16"}


# -- resume -------------------------------------------------------------------------------------


def epoch(plugin: Any, path: Path | None, to: Path, epochs: int) -> LanguageModel:
    model = Watched()
    trainer = make_trainer(plugin, max_epochs=epochs, limit_train_batches=4)
    trainer.fit(model, text_loader(), ckpt_path=None if path is None else str(path))
    trainer.save_checkpoint(to)
    return model


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    whole, half, rest = (tmp_path / name for name in "abc")
    straight = epoch(FP16Precision(loss_scaling=QUICK), None, whole, 2)
    epoch(FP16Precision(loss_scaling=QUICK), None, half, 1)
    resumed = epoch(FP16Precision(loss_scaling=QUICK), half, rest, 2)
    assert same_weights(straight, resumed)
    assert resumed.scales == straight.scales[4:]


def test_a_chain_of_plugins_loses_no_loss_scale(tmp_path: Path) -> None:
    plugins = [
        FP16Precision(loss_scaling=QUICK),
        precision_plugin("bf16"),
        FP8Precision("delayed"),
        FP16Precision(loss_scaling=QUICK),
    ]
    path: Path | None = None
    states = []
    for number, plugin in enumerate(plugins):
        to = tmp_path / f"{number}.ckpt"
        epoch(plugin, path, to, number + 1)
        states.append(torch.load(to, weights_only=True)[STATE_KEY])
        path = to
    scales = [state["loss_scale"] for state in states]
    assert scales[0] == scales[1] == scales[2]
    assert scales[3]["made"] + scales[3]["skipped"] == 8
    assert scales[3]["skipped"] >= scales[0]["skipped"] > 0
    assert set(states[2]["formats"].values()) == {"fp8-delayed", "bf16"}
    assert set(states[3]["formats"].values()) == {"fp16"}


def test_lightnings_own_scaler_is_taken_over_and_handed_back(tmp_path: Path) -> None:
    torchs = [
        torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)  # pyright: ignore
        for scale in (2.0**13, 2.0**5)
    ]
    paths = [tmp_path / name for name in "abc"]
    epoch(MixedPrecision("16-mixed", "cpu", scaler=torchs[0]), None, paths[0], 1)
    ours = epoch(FP16Precision(), paths[0], paths[1], 2)
    assert set(ours.scales) == {2.0**13}
    epoch(MixedPrecision("16-mixed", "cpu", scaler=torchs[1]), paths[1], paths[2], 3)
    assert torchs[1].get_scale() == 2.0**13
    assert torchs[1].state_dict()["_growth_tracker"] == 12
