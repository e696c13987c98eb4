"""What a CPU cannot show: the FP8 GEMM itself, its shape rules, host syncs, Triton.

These tests have not been run on hardware yet; they skip where there is no FP8 GPU.
"""

from __future__ import annotations

import dataclasses

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision, convert
from lightning_fp.kernels import NativeKernel

pytestmark = pytest.mark.gpu

FP8 = ("fp8-dynamic", "fp8-delayed", "fp8-rowwise", "fp8-rowwise-gw-hp")


def sqnr_db(reference: torch.Tensor, value: torch.Tensor) -> float:
    reference = reference.double()
    noise = (reference - value.double()).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(256, 512, device="cuda", dtype=dtype, requires_grad=True)
    w = torch.randn(1024, 512, device="cuda", dtype=dtype).mul_(0.02).requires_grad_()
    return x, w, torch.randn(256, 1024, device="cuda", dtype=dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_hardware_equals_emulation(dtype: torch.dtype, compiled: bool) -> None:
    """Same FP8 operands, so only the accumulation differs."""
    results = []
    for cuda_fp8 in (True, False):
        kernel = dataclasses.replace(NativeKernel(), cuda_fp8=cuda_fp8)
        x, w, g = operands(dtype)

        def multiply(x: torch.Tensor, w: torch.Tensor, kernel: NativeKernel = kernel):
            return kernel(x, w, None, "layer")

        run = torch.compile(multiply, fullgraph=True) if compiled else multiply
        output = run(x, w)
        output.backward(g)
        results.append((output, x.grad, w.grad))
    for hardware, emulated in zip(*results, strict=True):
        assert sqnr_db(emulated, hardware) > 35


@pytest.mark.parametrize(("wide", "out"), [(72, 64), (64, 72)])
def test_alignment_is_refused_by_name(wide: int, out: int) -> None:
    kernel = NativeKernel(cuda_fp8=True)
    x, w = torch.randn(32, wide, device="cuda"), torch.randn(out, wide, device="cuda")
    with pytest.raises(ValueError, match=r"layer 'mlp.up': .* must be a multiple of 16"):
        kernel(x, w, None, "mlp.up")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", FP8)
def test_any_number_of_tokens(format: str, dtype: torch.dtype, compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).cuda().to(dtype)
    convert(model, format, layers={"*": format})
    run = torch.compile(model) if compiled else model
    for tokens in (1, 7, 24, 33, 64):
        x = torch.randn(tokens, 64, device="cuda", dtype=dtype, requires_grad=True)
        run(x).square().mean().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("format", FP8)
def test_a_step_waits_for_nothing(format: str) -> None:
    """Contract 4: no host sync in forward, backward and the step's bookkeeping, once warm."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).cuda().bfloat16()
    table = convert(model, format, layers={"*": format}).precision_map
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        model(x).square().mean().backward()
        table.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
        table.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_follows_the_model_to_the_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    table = convert(model, "fp8-delayed", layers={"*": "fp8-delayed"}).precision_map
    model.cuda()
    model(torch.randn(32, 64, device="cuda")).sum().backward()
    table.step()
    history = table.state_dict()["scales"]["history"]
    assert history.is_cuda
    assert (history[..., 0] > 0).all()


@pytest.mark.parametrize("format", FP8)
def test_trains(format: str) -> None:
    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            self.losses: list[float] = []

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            loss = (self.net(batch[0]) - batch[0]).square().mean()
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    model = Model()
    data = torch.utils.data.TensorDataset(torch.randn(64 * 50, 64))
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        plugins=FP8Precision(format, layers={"net.*": format}),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=64))
    assert model.losses[-1] < model.losses[0] / 2
