"""Which kernel runs which format."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lightning_fp.kernels import BlockKernel, NativeKernel, TorchaoKernel, TorchaoMXKernel
from lightning_fp.kernels.memory import INPUT
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.kernels.transformer_engine.kernel import TransformerEngineKernel
from lightning_fp.layers import Conversion, kernel_for, linear_format
from lightning_fp.layers.conversion.decide import decide
from lightning_fp.layers.rules import layer_rules
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


# -- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8-block", "mxfp8"])
def test_blocks_are_emulated_where_there_is_no_hardware_or_asked_for(name: str) -> None:
    format = linear_format(name)
    emulated = kernel_for(format, "auto", cuda_fp8=False)
    assert isinstance(emulated, BlockKernel)
    for cuda_fp8 in (False, True):
        assert kernel_for(format, "native", cuda_fp8=cuda_fp8) == emulated
    high = kernel_for(linear_format(f"{name}[grad_weight=high]"), "auto", cuda_fp8=False)
    assert isinstance(high, BlockKernel)
    assert high.high_grad_weight


def test_the_details_of_a_block_format_reach_its_kernel() -> None:
    format = linear_format("fp8-block[input=e5m2,grad_output=e5m2,power_of_two=true]")
    kernel = kernel_for(format, "auto", cuda_fp8=False)
    assert isinstance(kernel, BlockKernel)
    names = kernel.input.name, kernel.weight.name, kernel.grad_output.name, kernel.scales
    assert names == ("e5m2", "e4m3", "e5m2", "power_of_two")


@pytest.mark.parametrize(
    ("name", "backend", "cuda_fp8", "message"),
    [
        (
            "fp8-block[input=e5m2,grad_output=e5m2]",
            "auto",
            True,
            "here: grad_weight would be",
        ),
        ("fp8-block", "torchao", False, "backend 'torchao' cannot run 'fp8-block'"),
        ("mxfp8[input=e5m2]", "torchao", False, "torchao's MXFP8 has e4m3 for all operands"),
        ("mxfp8[grad_output=e5m2]", "auto", True, "torchao's MXFP8 has e4m3 for all operands"),
        ("fp8-dynamic[input=e5m2]", "auto", True, "'fp8-dynamic[input=e5m2]' cannot run on FP8"),
        ("fp8-dynamic[input=e5m2]", "torchao", True, "grad_output='e4m3' or grad_weight='high'"),
        ("fp8-delayed[weight=e5m2]", "auto", True, "grad_input would be grad_output in e5m2 by"),
        ("fp8-delayed[input=e4m3fnuz]", "native", True, "a format of AMD's; take input='e4m3'"),
        ("fp8-rowwise[input=e5m2]", "auto", True, "input in e5m2 with a scale per row"),
    ],
)
def test_what_no_engine_has_is_refused(
    name: str, backend: str, cuda_fp8: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel_for(linear_format(name), backend, cuda_fp8=cuda_fp8)  # pyright: ignore


@pytest.mark.parametrize("name", ["input=e5m2", "weight=e5m2", "grad_output=e5m2fnuz"])
def test_products_that_hardware_has_not_are_emulated_elsewhere(name: str) -> None:
    kernel = kernel_for(linear_format(f"fp8-dynamic[{name}]"), "auto", cuda_fp8=False)
    assert isinstance(kernel, NativeKernel)
    with pytest.raises(ValueError, match="cuda_fp8 must be False for these formats"):
        dataclasses.replace(kernel, cuda_fp8=True)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretends that one CUDA device is here."""

    def pretend(*capability: int, torch_version: str = "2.13.0", cuda: str = "12.9") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        kernel_for.cache_clear()

    yield pretend
    kernel_for.cache_clear()


def test_mxfp8_before_blackwell_is_refused(card: Callable[..., None]) -> None:
    card(9, 0)
    with pytest.raises(ValueError, match=r"cannot run here: MX formats need.*sm90.*'native'"):
        kernel_for(linear_format("mxfp8"), "auto", cuda_fp8=True)


def test_blocks_of_128_run_on_hopper(card: Callable[..., None]) -> None:
    card(9, 0, torch_version="2.14.1+cu130", cuda="13.0")
    kernel = kernel_for(linear_format("fp8-block"), "auto", cuda_fp8=True)
    assert (kernel.name, kernel.runs_on_fp8_hardware) == ("native", True)
    assert not kernel_for(linear_format("mxfp8"), "native", cuda_fp8=True).runs_on_fp8_hardware


@pytest.mark.parametrize(
    ("capability", "versions", "reason"),
    [
        ((10, 0), {}, "need sm90 (Hopper), this device is sm100; take"),
        ((8, 9), {}, "need sm90 (Hopper), this device is sm89; take"),
        ((9, 0), {"cuda": "12.8"}, "built for CUDA 12.9 or later, this is torch 2.13.0 for CUDA"),
        ((9, 0), {"torch_version": "2.11.0"}, "need torch 2.13 built for CUDA 12.9 or later"),
    ],
)
def test_blocks_of_128_are_refused_elsewhere(
    card: Callable[..., None], capability: tuple[int, int], versions: dict[str, str], reason: str
) -> None:
    card(*capability, **versions)
    with pytest.raises(ValueError, match=re.escape(reason)):
        kernel_for(linear_format("fp8-block"), "auto", cuda_fp8=True)


def test_a_plan_for_another_machine_leaves_out_what_has_no_whole_blocks() -> None:
    kernel = kernel_for(linear_format("mxfp8"), "auto", cuda_fp8=True)
    assert isinstance(kernel, TorchaoMXKernel)
    assert kernel.runs_on_fp8_hardware
    model, format = nn.Sequential(nn.Linear(4096, 48), nn.Linear(48, 4096)), linear_format("mxfp8")
    with pytest.raises(ValueError, match="1: in_features=48 is not a multiple of 32"):
        decide(model, Conversion(format=format, cuda_fp8=True))
    with pytest.raises(ValueError, match="layer '1': in_features must be a multiple of 32"):
        decide(model, Conversion(format=format, rules=layer_rules({"1": "mxfp8"}), cuda_fp8=True))
    # Emulated, both are converted all the same.
    decisions = decide(model, Conversion(format=format, cuda_fp8=False))
    assert all(decision.reason is None for decision in decisions.values())


def test_only_transformer_engine_runs_nvfp4() -> None:
    nvfp4 = linear_format("nvfp4")
    for backend in ("auto", "native", "torchao"):
        with pytest.raises(ValueError, match="only Transformer Engine multiplies in it, on sm100"):
            kernel_for(nvfp4, backend, cuda_fp8=True)
    kernel = kernel_for(nvfp4, "transformer-engine", cuda_fp8=True)
    assert isinstance(kernel, TransformerEngineKernel)
    assert kernel.settings.kind == "nvfp4"
    with pytest.raises(ValueError, match="its NVFP4 recipe leaves nothing to choose"):
        kernel_for(linear_format("nvfp4[grad_weight=high]"), "transformer-engine", cuda_fp8=True)
    with pytest.raises(ValueError, match="weight must be 'e2m1' with granularity 'nv'"):
        linear_format("nvfp4[weight=e4m3]")


def test_casts_of_nvfp4_use_all_of_e2m1_in_every_block_of_16() -> None:
    kernel = kernel_for(linear_format("nvfp4"), "transformer-engine", cuda_fp8=True)
    x = torch.randn(32, 48) * 2.0 ** torch.arange(3).repeat_interleave(16)
    scales, e2m1 = kernel.cast_of(INPUT, x, None)
    largest = (x * scales).view(32, 3, 16).abs().amax(dim=2)
    assert torch.allclose(largest, torch.tensor(e2m1.max), rtol=1e-6)
    assert e2m1.max == 6.0
