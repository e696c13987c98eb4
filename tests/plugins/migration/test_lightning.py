"""Options of other libraries: each is translated, noted or refused; none is dropped in silence."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.plugins.precision.transformer_engine import TransformerEnginePrecision

from lightning_fp import DelayedScaling, FP8Precision
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.plugins.migration import from_lightning, from_megatron, from_options
from lightning_fp.stability.loss_scaling import LossScaling
from tests.helper import fit, same_weights

# -- Lightning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixedPrecision("bf16-mixed", "cpu"),
        lambda: HalfPrecision("bf16-true"),
        lambda: Precision(),
    ],
    ids=["bf16-mixed", "bf16-true", "32-true"],
)
def test_a_run_in_high_precision_stays_the_same_bit_for_bit(make: Any) -> None:
    expected, found = fit(make(), max_steps=5), fit(from_lightning(make()), max_steps=5)
    assert found.losses == expected.losses
    assert same_weights(found, expected)


def test_a_gradient_scaler_keeps_its_settings() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7, growth_factor=4.0)
    plugin = from_lightning(MixedPrecision("16-mixed", "cpu", scaler))
    assert plugin.precision == "16-mixed"
    scaling = plugin.settings()["loss_scaling"]
    assert (scaling["init_scale"], scaling["growth_interval"]) == (1024, 7)
    assert (scaling["growth_factor"], scaling["hysteresis"]) == (4, 1)


@dataclasses.dataclass
class Recipe:
    """The fields of Transformer Engine's DelayedScaling, with its defaults."""

    margin: int = 0
    fp8_format: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(name="HYBRID"))
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


def transformer_engine(
    weights: torch.dtype = torch.bfloat16, compute: torch.dtype | None = None, **options: Any
) -> TransformerEnginePrecision:
    """Lightning's plugin as its constructor leaves it, which wants the library installed."""
    plugin = object.__new__(TransformerEnginePrecision)
    plugin.weights_dtype, plugin.fallback_compute_dtype = weights, compute or weights
    plugin.replace_layers = options.pop("replace_layers", None)
    plugin.recipe = Recipe(**options)  # pyright: ignore
    return plugin


def test_lightnings_transformer_engine() -> None:
    plugin = from_lightning(transformer_engine(margin=1, amax_history_len=32))
    assert isinstance(plugin, FP8Precision)
    settings = plugin.settings()
    assert (plugin.precision, settings["fp8_eval"]) == ("bf16-true", True)
    assert settings["delayed"] == dataclasses.asdict(DelayedScaling(32, "max", 1))
    mixed = from_lightning(transformer_engine(torch.float32, torch.bfloat16))
    assert mixed.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (FSDPPrecision("bf16-mixed"), "FSDPPrecision has no equal here; take ModelParallelStr"),
        (DoublePrecision(), "DoublePrecision has no equal here; no format here has 64 bits"),
        (transformer_engine(replace_layers=False), "replace_layers=False) has no equal here"),
        (transformer_engine(torch.float16), "must have float32 or bfloat16 weights, got float16"),
        (transformer_engine(fp8_mha=True), "option fp8_mha has no equal here, got True"),
        (transformer_engine(amax_compute_algo=max), "amax_compute_algo has no equal here"),
    ],
)
def test_what_has_no_equal_is_refused(plugin: Precision, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_lightning(plugin)


def test_ours_stays_what_it_is() -> None:
    plugin = FP8Precision()
    assert from_lightning(plugin) is plugin


# -- other libraries ------------------------------------------------------------------------------

NEMO = {"precision": "bf16-mixed", "fp8": "hybrid"}
BLOCKS = [f"*layers.{i}.*" for i in range(4)]


@pytest.mark.parametrize(
    ("library", "options", "expected"),
    [
        ("nemo", NEMO, {"scaling": DelayedScaling(1, "most_recent"), "fp8_eval": True}),
        ("nemo", {**NEMO, "fp8_recipe": "tensorwise"}, {"scaling": "fp8-dynamic"}),
        (
            "nemo",
            {**NEMO, "fp8": "e4m3", "fp8_recipe": "blockwise"},
            {"scaling": "fp8-block[power_of_two=true]"},
        ),
        (
            "nemo",
            {**NEMO, "fp8_recipe": "mxfp8", "fp8_wgrad": False},
            {"scaling": "mxfp8[grad_output=e5m2,grad_weight=high]"},
        ),
        ("nemo", {"precision": "bf16"}, {"scaling": "bf16", "base": "bf16-mixed"}),
        ("nemo", {"precision": 32}, {"scaling": "fp32", "base": "32-true"}),
        (
            "nemo",
            {**NEMO, "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2},
            {"layers": dict.fromkeys((BLOCKS[0], BLOCKS[2], BLOCKS[3]), "bf16")},
        ),
        (
            "nemo",
            {"precision": "16-mixed", "fp16_hysteresis": 3},
            {
                "loss_scaling": LossScaling(
                    init_scale=2.0**32, growth_interval=1000, hysteresis=3, max_scale=2.0**100
                )
            },
        ),
        (
            "nemo",
            {"precision": "16-mixed", "fp16_loss_scale": 128},
            {"loss_scaling": LossScaling.static(128.0)},
        ),
        ("nemo-automodel", {}, {"scaling": "fp8-dynamic"}),
        ("nemo-automodel", {"enabled": False}, {"scaling": "bf16"}),
        (
            "torchtitan",
            {"recipe_name": "rowwise_with_gw_hp", "filter_fqns": ["wk", "output"]},
            {"scaling": "fp8-rowwise-gw-hp", "layers": {"*wk*": "bf16", "*output*": "bf16"}},
        ),
        (
            "accelerate",
            {"backend": "TE"},
            {"scaling": DelayedScaling(1024, "most_recent"), "fp8_eval": False},
        ),
        (
            "accelerate",
            {"use_mxfp8_block_scaling": True, "fp8_format": "E4M3"},
            {"scaling": "mxfp8"},
        ),
        (
            "accelerate",
            SimpleNamespace(margin=2, use_autocast_during_eval=True, amax_compute_algo="max"),
            {"scaling": DelayedScaling(1024, "max", 2), "fp8_eval": True},
        ),
    ],
)
def test_options_and_what_they_are_here(library: Any, options: Any, expected: Any) -> None:
    found = from_options(library, options, blocks=BLOCKS)
    assert {name: found.arguments[name] for name in expected} == expected
    assert found.plugin().settings()["backend"] == "auto"


def test_the_backend_is_a_choice_apart() -> None:
    assert from_options("nemo", NEMO, backend="native").plugin().settings()["backend"] == "native"
    lightnings = from_lightning(MixedPrecision("bf16-mixed", "cpu"), backend="torchao")
    assert lightnings.settings()["backend"] == "torchao"
    megatrons = from_megatron(megatron(("*", "mxfp8")), "mxfp8", backend="torchao")
    assert megatrons.plugin().settings()["backend"] == "torchao"


def test_torchaos_config_is_taken_as_it_is() -> None:
    config = import_float8().Float8LinearConfig.from_recipe_name("rowwise")
    found = from_options("accelerate", {"config": config, "module_filter_func": None})
    assert found.arguments["scaling"] is config
    assert "first and the last" in found.notes[0]


def test_what_changes_no_arithmetic_is_noted() -> None:
    found = from_options("nemo", {**NEMO, "fp8_param_gather": True, "params_dtype": "bf16"})
    assert [note.split(":")[0] for note in found.notes] == ["params_dtype", "fp8_param_gather"]
    assert not from_options("nemo", {**NEMO, "grad_reduce_in_fp32": True}).notes


@pytest.mark.parametrize(
    ("library", "options", "message"),
    [
        ("deepspeed", {}, "library must be one of nemo, nemo-automodel, torchtitan, accelerate"),
        ("nemo", {**NEMO, "fp9": 1}, "nemo options must be those of its documentation, got fp9"),
        ("nemo", {**NEMO, "fp8_recipe": "custom"}, "option fp8_recipe has no equal here, got 'cu"),
        ("nemo", {"fp8": "e3m4"}, "option fp8_format has no equal here, got 'e3m4'"),
        ("nemo", {"precision": "64"}, "option precision has no equal here, got '64'"),
        ("nemo", {**NEMO, "fp8_dot_product_attention": True}, "attention stays in the base"),
        ("nemo", {**NEMO, "fp8": "e4m3"}, "'fp8-delayed[grad_output=e4m3]' together with"),
        ("nemo", {**NEMO, "first_last_layers_bf16": True}, "blocks must name the model's blocks"),
        ("torchtitan", {"recipe_name": "mx"}, "option recipe_name has no equal here, got 'mx'"),
        ("torchtitan", {"enable_fsdp_float8_all_gather": True}, "a weight that arrives in FP8"),
        ("accelerate", {"backend": "MSAMP", "opt_level": "O2"}, "option backend has no equal"),
        ("accelerate", {"interval": 4}, "option interval has no equal here, got 4; scales are"),
        ("accelerate", {"override_linear_precision": (True, False, False)}, "only the weight's"),
        ("accelerate", {"backend": "AO", "module_filter_func": print}, "name layers with layers="),
    ],
)
def test_what_changes_the_arithmetic_without_an_equal_is_refused(
    library: Any, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_options(library, options)


# -- Megatron's file ------------------------------------------------------------------------------

CONFIGS = """
configs:
  mxfp8: {transformer_engine_config_type: TEQuantizationParams,
          training_recipe: {fp8_quantization_recipe: mxfp8}}
  current: {transformer_engine_config_type: TEQuantizationParams,
            training_recipe: {fp8_quantization_recipe: tensorwise, fp8_format: hybrid,
                              override_nonquantized_autocast: true}}
  evaluate_high: {transformer_engine_config_type: TEQuantizationParams,
                  training_recipe: {fp8_quantization_recipe: blockwise}, evaluation_recipe: {}}
  bf16: {transformer_engine_config_type: TEQuantizationParams, training_recipe: {}}
  broken: {transformer_engine_config_type: TEQuantizationParams,
           training_recipe: {fp8_quantization_recipe: delayed}}
matchers:
"""


def megatron(*matchers: tuple[str, str], more: str = "") -> str:
    lines = [
        f"  m{i}: {{type: glob, enabled: true, pattern: '{pattern}', config: {config}{more}}}"
        for i, (pattern, config) in enumerate(matchers)
    ]
    return CONFIGS + "\n".join(lines)


def test_the_first_matcher_wins_and_disabled_ones_do_not_count(tmp_path: Path) -> None:
    text = megatron(("*.fc1", "bf16"), ("*.fc1", "mxfp8"), ("*.qkv", "mxfp8"))
    text += "\n  off: {type: glob, enabled: false, pattern: '*', config: bf16}\n"
    path = tmp_path / "te_quant.cfg"
    path.write_text(text)
    for source in (text, path, str(path)):
        found = from_megatron(source, "fp8-dynamic")
        assert found.arguments["layers"] == {"*.fc1": "bf16", "*.qkv": "mxfp8"}
        assert found.arguments["fp8_eval"]
    model = fit(found.plugin(), max_steps=2)
    formats = {name: layer.format.name for name, layer in named_formats(model)}
    assert formats["blocks.0.fc1"] == "bf16"
    assert formats["blocks.1.qkv"] == "mxfp8"
    assert formats["blocks.1.fc2"] == "fp8-dynamic"


def named_formats(model: Any) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.model.named_modules() if hasattr(m, "format")]


def test_a_layer_in_high_precision_stays_there_unless_overridden() -> None:
    text = megatron(("*.a", "mxfp8"), ("*.b", "current"), ("*.c", "bf16"))
    assert from_megatron(text).arguments["layers"] == {
        "*.a": "bf16",
        "*.b": "fp8-dynamic",
        "*.c": "bf16",
    }


def test_evaluation_in_high_precision() -> None:
    found = from_megatron(megatron(("*.a", "evaluate_high")), "fp8-dynamic")
    assert found.arguments["layers"] == {"*.a": "fp8-block[power_of_two=true]"}
    assert not found.arguments["fp8_eval"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (megatron(("*", "broken")), "has no equal here, got 'delayed'; Megatron refuses it"),
        (megatron(("*", "none")), "config must be one of mxfp8, current, evaluate_high, bf16"),
        (megatron(("*", "mxfp8"), ("a", "evaluate_high")), "configs must evaluate alike"),
        (megatron(("*", "bf16"), more=", regex: 1"), "documentation, got regex"),
        (CONFIGS.replace("matchers:", ""), "matchers must be a mapping of mappings"),
        ("nowhere.yaml", "path_or_text must be a file or YAML of several lines"),
        ("a: [\n", "path_or_text must be YAML"),
    ],
)
def test_what_is_no_such_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_megatron(text, "fp8-dynamic")
