"""Which kernel runs which format."""

from __future__ import annotations

import re

import pytest

from lightning_fp.kernels import NativeKernel, TorchaoKernel
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.layers import kernel_for, linear_format
from tests.helper import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_equal_formats_give_equal_kernels(name: str) -> None:
    one = kernel_for(linear_format(name), "auto", cuda_fp8=False)
    other = kernel_for(linear_format(name), "auto", cuda_fp8=False)
    assert one == other
    assert hash(one) == hash(other)


def test_auto_takes_native_per_tensor_and_torchao_per_row() -> None:
    for name, kernel in (
        ("fp8-dynamic", "native (emulated)"),
        ("fp8-dynamic[grad_weight=high]", "native (emulated)"),
        ("fp8-dynamic[power_of_two=true]", "torchao (emulated)"),
        ("fp8-rowwise", "torchao (emulated)"),
        ("fp8-rowwise-gw-hp", "torchao (emulated)"),
        ("e8m3", "simulated"),
        ("fp32", "nn.Linear"),
    ):
        assert kernel_for(linear_format(name), "auto", cuda_fp8=False).name == kernel


def test_the_backend_is_obeyed() -> None:
    dynamic = linear_format("fp8-dynamic")
    assert isinstance(kernel_for(dynamic, "native", cuda_fp8=True), NativeKernel)
    assert isinstance(kernel_for(dynamic, "torchao", cuda_fp8=True), TorchaoKernel)
    for backend in ("native", "torchao"):
        assert kernel_for(dynamic, backend, cuda_fp8=True).runs_on_fp8_hardware
        assert not kernel_for(dynamic, backend, cuda_fp8=False).runs_on_fp8_hardware


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_named_formats_are_torchaos_recipes(recipe: str) -> None:
    config = import_float8().Float8LinearConfig.from_recipe_name(recipe)
    name = {"tensorwise": "fp8-dynamic", "rowwise": "fp8-rowwise"}.get(recipe, "fp8-rowwise-gw-hp")
    ours = kernel_for(linear_format(name), "torchao", cuda_fp8=False)
    assert isinstance(ours, TorchaoKernel)
    assert ours.config == config
    theirs = kernel_for(linear_format(config), "auto", cuda_fp8=False)
    assert isinstance(theirs, TorchaoKernel)
    assert theirs.config is config


@pytest.mark.parametrize(
    ("format", "backend", "message"),
    [
        ("bf16", "cuda", "backend must be one of auto, native, torchao, transformer-engine, got"),
        (
            "fp8-rowwise",
            "native",
            "backend 'native' cannot run 'fp8-rowwise': it scales per tensor",
        ),
        (
            "fp8-dynamic[power_of_two=true]",
            "native",
            "backend 'native' cannot run 'fp8-dynamic[pow",
        ),
    ],
)
def test_impossible_combinations_are_refused(format: str, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel_for(linear_format(format), backend, cuda_fp8=False)  # pyright: ignore


def test_a_torchao_config_is_not_for_native() -> None:
    config = import_float8().Float8LinearConfig()
    with pytest.raises(
        ValueError, match=r"backend must be 'auto' or 'torchao' for a torchao config"
    ):
        kernel_for(linear_format(config), "native", cuda_fp8=False)


def test_fsdp_float8_all_gather_is_refused() -> None:
    config = import_float8().Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    with pytest.raises(ValueError, match="enable_fsdp_float8_all_gather must be False"):
        kernel_for(linear_format(config), "auto", cuda_fp8=False)
