"""FP8Precision in a Trainer: exact where it must be, clear where it refuses."""

from __future__ import annotations

import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from lightning_fp import FP8Precision, FP16Precision, LinearFormat
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.layers import FPLinear
from lightning_fp.plugins.strategies import refuse_strategy
from tests.helper import LanguageModel, fit, make_trainer, same_weights, text_loader

BASES = {
    "bf16-mixed": (lambda: MixedPrecision("bf16-mixed", "cpu"), "bf16"),
    "bf16-true": (lambda: HalfPrecision("bf16-true"), "bf16"),
    "32-true": (Precision, "fp32"),
}


@pytest.mark.parametrize("base", BASES)
def test_high_precision_is_lightnings_own_run_bit_for_bit(base: Any) -> None:
    lightnings, high = BASES[base]
    expected = fit(lightnings())
    assert len(expected.losses) == 50
    for plugin in (FP8Precision(base=base, layers={"*": high}), FP8Precision(high, base=base)):
        model = fit(plugin)
        assert isinstance(model.model.blocks[0].fc1, FPLinear)
        assert model.losses == expected.losses
        assert same_weights(model, expected)


def test_high_precision_is_exact_with_everything_turned_on() -> None:
    options: dict[str, Any] = {
        "max_steps": 15,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "val_check_interval": 10,
        "limit_val_batches": 2,
    }

    class WithValidation(LanguageModel):
        def val_dataloader(self) -> Any:
            return text_loader(8)

    runs = [
        fit(plugin, WithValidation(dropout=0.1), **options)
        for plugin in (MixedPrecision("bf16-mixed", "cpu"), FP8Precision(layers={"*": "bf16"}))
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].val_losses == runs[1].val_losses != []
    assert same_weights(*runs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scaling", ["dynamic", "rowwise-gw-hp"])
def test_fp8_learns_as_high_precision_does(scaling: str, base: Any) -> None:
    lightnings, _ = BASES[base]
    expected, model = fit(lightnings()), fit(FP8Precision(scaling, base=base))
    assert model.losses != expected.losses
    gap = sum(model.losses[-10:]) / sum(expected.losses[-10:]) - 1
    assert abs(gap) < 0.02
    assert sum(model.losses[-5:]) < 0.9 * sum(model.losses[:5])


def test_the_same_seed_gives_the_same_run() -> None:
    one, other = (fit(FP8Precision(), max_steps=10) for _ in range(2))
    assert one.losses == other.losses
    assert same_weights(one, other)


def test_setup_fills_the_table_and_the_report() -> None:
    plugin = FP8Precision(layers={"*.fc1": "fp8-rowwise"})
    assert plugin.precision_map.formats() == {}
    assert plugin.report is None
    model = LanguageModel()
    model.example_input_array = torch.zeros(1, 16, dtype=torch.long)
    fit(plugin, model, max_steps=1)
    assert plugin.precision_map.formats()["model.blocks.0.fc1"] == "fp8-rowwise"
    assert plugin.precision_map.formats()["model.blocks.0.fc2"] == "fp8-dynamic"
    assert plugin.precision_map.formats()["model.lm_head"] == "bf16"
    assert plugin.report is not None
    assert plugin.report.measured
    assert 0.4 < plugin.report.flops_share < 0.8


def test_the_start_of_a_fit_says_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(FP8Precision(), max_steps=1)
    (line,) = [r.getMessage() for r in caplog.records if "FP8Precision" in r.getMessage()]
    assert line.startswith("FP8Precision (bf16-mixed): 8 of 9 linear layers in low precision")
    assert "left in bf16: model.lm_head (output head)" in line


def test_the_bases_high_precision() -> None:
    plugin = FP8Precision(base="32-true")
    fit(plugin, max_steps=1)
    assert plugin.precision_map.formats()["model.lm_head"] == "fp32"
    assert plugin.precision == "32-true"


def test_a_second_fit_with_another_plugin_reconverts() -> None:
    model = LanguageModel()
    first, second = FP8Precision(), FP8Precision("rowwise")
    fit(first, model, max_steps=2)
    fit(second, model, max_steps=2)
    fc1 = model.model.blocks[0].fc1
    assert fc1.format.name == "fp8-rowwise"
    assert fc1.phase is second.precision_map.phase
    assert second.precision_map.layers["model.blocks.0.fc1"] is fc1


def test_one_plugin_for_two_models() -> None:
    plugin = FP8Precision()
    for _ in range(2):
        model = LanguageModel()
        fit(plugin, model, max_steps=1)
        assert plugin.precision_map.model is model
        assert isinstance(model.model.blocks[0].fc1, FPLinear)


def test_validate_test_and_predict_change_nothing() -> None:
    plugin, model = FP8Precision(), LanguageModel()
    trainer = make_trainer(plugin, max_steps=2)
    trainer.fit(model, text_loader())
    plugin.precision_map.set("*.fc1", "e8m3")
    plugin.precision_map.apply()
    formats, layers = plugin.precision_map.formats(), dict(plugin.precision_map.layers)
    for _ in range(2):
        trainer.validate(model, text_loader(8), verbose=False)
        trainer.test(model, text_loader(8), verbose=False)
        trainer.predict(model, text_loader(8))
    assert plugin.precision_map.formats() == formats
    assert plugin.precision_map.layers == layers


def test_manual_optimization_with_two_optimizers() -> None:
    class Adversaries(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
            self.formats: list[tuple[str, str]] = []

        def training_step(self, batch: Any, index: int) -> None:
            x = torch.randn(16, 32)
            for optimizer, loss in zip(
                self.optimizers(),
                (
                    lambda: self.two(self.one(x)).square().mean(),
                    lambda: -self.two(x).square().mean(),
                ),
                strict=True,
            ):
                self.formats.append((self.one.format.name, self.two.format.name))
                optimizer.zero_grad()
                self.manual_backward(loss())
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.one, self.two)]

    class Writer(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.precision_plugin.precision_map.set("one", "bf16")

    model, plugin = Adversaries(), FP8Precision()
    before = [parameter.clone() for parameter in model.parameters()]
    fit(plugin, model, max_steps=10, callbacks=[Writer()])
    assert model.formats == [("fp8-dynamic",) * 2] * 4 + [("bf16", "fp8-dynamic")] * 6
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert plugin.precision_map.phase.evaluating is None


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "statc"}, "scaling: format must be one of"),
        ({"scaling": "nvfp4"}, "backend 'auto' cannot run 'nvfp4': only Transformer Engine"),
        (
            {"base": "64-true"},
            "base must be one of bf16-mixed, bf16-true, 32-true, 16-mixed, 16-true, got '64-true'",
        ),
        ({"backend": "cutlass"}, "backend must be one of auto, native, torchao"),
        ({"layers": {"*": "bf17"}}, "layers['*']: format must be one of"),
        ({"layers": ["*"]}, "layers must be a mapping {pattern: format}, got list"),
        (
            {"scaling": "rowwise", "backend": "native"},
            "backend 'native' cannot run 'fp8-rowwise': it scales per tensor, by any factor",
        ),
        (
            {"layers": {"*": "fp8-rowwise"}, "backend": "native"},
            "backend 'native' cannot run 'fp8-rowwise'",
        ),
    ],
)
def test_bad_options_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FP8Precision(**options)


def test_fsdp_float8_all_gather_is_refused_at_construction() -> None:
    config = import_float8().Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    with pytest.raises(ValueError, match="enable_fsdp_float8_all_gather must be False, got True"):
        FP8Precision(config)


def test_scalings_of_every_kind() -> None:
    config = import_float8().Float8LinearConfig.from_recipe_name("rowwise")
    for scaling in ("fp8-rowwise", "rowwise", LinearFormat("dynamic", "row"), config, "e8m3", "mx"):
        plugin = FP8Precision(scaling)
        fit(plugin, max_steps=1)
        assert plugin.report is not None
        assert len(plugin.report.converted) == 8


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (None, {"*.fc3": "bf16"}, "pattern '*.fc3' matches no linear layer"),
        (None, {"*": "bf16", "*.fc1": "fp8-dynamic"}, "rule '*.fc1' never applies"),
        (None, {"model.embed": "bf16"}, "matches only modules that cannot be converted"),
        (nn.Conv1d(3, 3, 3), None, "nothing to convert: the model has no nn.Linear layer"),
        (nn.Linear(30, 30), None, "nothing to convert: every linear layer was left"),
    ],
)
def test_bad_rules_are_refused_at_setup(model: nn.Module | None, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(FP8Precision(layers=layers), LanguageModel(model), max_steps=1)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DeepSpeedStrategy, "strategy must not be DeepSpeedStrategy with FP8Precision: DeepSpeed"),
        (XLAStrategy, "strategy must not be XLAStrategy with FP8Precision: XLA devices have no"),
        (SingleDeviceXLAStrategy, "strategy must not be SingleDeviceXLAStrategy with FP8Precision"),
    ],
)
def test_strategies_without_fp8_are_refused(strategy: type[Any], message: str) -> None:
    # The packages behind them are not installed; the classes are real, only not constructed.
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_strategy(strategy.__new__(strategy), "FP8Precision")


def test_other_strategies_pass() -> None:
    refuse_strategy(DDPStrategy(), "FP8Precision")
    refuse_strategy(SingleDeviceStrategy("cpu"), "FP8Precision")


def test_the_other_lightning_package_is_told_apart() -> None:
    other = pytest.importorskip("pytorch_lightning")
    with pytest.raises(
        Exception, match=re.escape("(`import lightning as L`; the pytorch_lightning")
    ):
        other.Trainer(plugins=FP8Precision(), logger=False)


def test_the_number_formats_of_fp8_are_not_fp8_training() -> None:
    for name in ("e4m3", "e5m2"):
        with pytest.warns(UserWarning, match=f"scaling '{name}' is a simulated .* 'fp8-dynamic'"):
            FP8Precision(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FP8Precision("e8m3")
        FP8Precision("dynamic", layers={"*head": "e4m3"})


def test_a_short_repr() -> None:
    assert repr(FP8Precision()) == "FP8Precision('fp8-dynamic')"
    assert repr(FP8Precision("auto")) == "FP8Precision('auto')"
    long = FP8Precision("delayed", base="32", layers={"*head": "bf16"})
    assert repr(long) == "FP8Precision('fp8-delayed', base='32-true', layers={'*head': 'bf16'})"
    assert repr(FP16Precision("16-true")) == "FP16Precision('16-true')"


def test_what_runs_is_said_once_for_a_model(caplog: pytest.LogCaptureFixture) -> None:
    plugin, model = FP8Precision(), LanguageModel(blocks=1)
    with caplog.at_level("INFO"):
        for _ in range(2):
            trainer = make_trainer(plugin, max_steps=1)
            trainer.fit(model, text_loader(8))
            trainer.validate(model, text_loader(8), verbose=False)
            trainer.predict(model, text_loader(8))
        assert caplog.text.count("linear layers in low precision") == 1
        make_trainer(plugin, max_steps=1).fit(LanguageModel(blocks=1), text_loader(8))
    assert caplog.text.count("linear layers in low precision") == 2
