"""Transformer Engine itself, on a GPU that it supports.

These tests have not been run on hardware yet; they skip where it is not installed or cannot run.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import ClampMonitor, FP8Precision, convert, revert
from lightning_fp.kernels.transformer_engine import availability
from lightning_fp.records import read_statistics

pytestmark = pytest.mark.gpu

TE = "transformer-engine"


@pytest.fixture(autouse=True)
def needs_transformer_engine() -> None:
    reason = availability()["fp8-delayed"]
    if reason is not None:
        pytest.skip(reason)


def formats() -> list[str]:
    return ["fp8-dynamic", "fp8-delayed", "fp8-block", "mxfp8"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512), nn.GELU(), nn.Linear(512, 512)]
    return nn.Sequential(*layers).cuda()


def step(module: nn.Module, table: Any, x: Tensor) -> float:
    with table.forward_context(), torch.autocast("cuda", torch.bfloat16):
        loss = module(x).float().square().mean()
    loss.backward()
    table.after_backward()
    table.step()
    return loss.item()


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    reference, value = reference.double(), value.double()
    return 20 * math.log10(reference.norm() / (reference - value).norm())


@pytest.mark.parametrize("format", formats())
def test_products_and_gradients_are_close_to_high_precision(format: str) -> None:
    reason = availability()[format]
    if reason is not None:
        pytest.skip(reason)
    module = model()
    plain, x = copy.deepcopy(module), torch.randn(256, 512, device="cuda")
    table = convert(module, format, {"*": format}, backend=TE).precision_map
    for _ in range(2):  # under delayed scaling the first step looks for scales
        module.zero_grad()
        step(module, table, x)
    with torch.autocast("cuda", torch.bfloat16):
        plain(x).float().square().mean().backward()
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert sqnr_db(q.grad, p.grad) > 15, name
    assert revert(module) == 3
    assert list(module.state_dict()) == list(plain.state_dict())


def test_dynamic_scaling_agrees_with_our_own_kernel() -> None:
    module = model()
    ours, x = copy.deepcopy(module), torch.randn(256, 512, device="cuda")
    table = convert(module, "fp8-dynamic", {"*": "fp8-dynamic"}, backend=TE).precision_map
    mine = convert(ours, "fp8-dynamic", {"*": "fp8-dynamic"}, backend="native").precision_map
    assert step(module, table, x) == pytest.approx(step(ours, mine, x), rel=2e-3)


def test_a_layer_falls_back_under_delayed_scaling_without_harm_to_the_others() -> None:
    module, x = model(), torch.randn(256, 512, device="cuda")
    table = convert(module, "fp8-delayed", {"*": "fp8-delayed"}, backend=TE).precision_map
    for _ in range(4):
        step(module, table, x)
    before = table.scale_history.state_dict()
    table.set("2", "bf16")
    table.set("4", "fp8-dynamic")
    table.apply()
    for _ in range(4):
        step(module, table, x)
    after = table.scale_history.state_dict()
    assert after["layers"] == ["0"]
    # same weights, same batch: the same scales, and one entry of the history per step
    torch.testing.assert_close(after["scales"][0], before["scales"][0], rtol=1e-2, atol=0)
    assert (after["history"][0, :, :7] > 0).all()


def test_evaluation_reaches_no_history() -> None:
    module, x = model(), torch.randn(256, 512, device="cuda")
    table = convert(module, "fp8-delayed", {"*": "fp8-delayed"}, backend=TE).precision_map
    for _ in range(3):
        step(module, table, x)
    before = table.scale_history.state_dict()
    module.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        module(1000 * torch.randn(3, 512, device="cuda"))  # 3 rows: would be refused in FP8
    module.train()
    step(module, table, x)
    after = table.scale_history.state_dict()
    torch.testing.assert_close(after["scales"], before["scales"], rtol=1e-2, atol=0)


class Run(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = model()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self.body(batch).float() - batch.roll(1, dims=1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randn(1024, 512, generator=generator), batch_size=64)


def trainer(plugin: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="gpu", devices=1, plugins=plugin, **{**quiet, **options})


def plugin(scaling: str, **options: Any) -> FP8Precision:
    return FP8Precision(scaling, backend=TE, layers={"*": f"fp8-{scaling}"}, **options)


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_a_checkpoint_continues_and_has_no_pickles(tmp_path: Path, scaling: str) -> None:
    path = tmp_path / "epoch.ckpt"
    whole = Run()
    first = trainer(plugin(scaling), max_epochs=1)
    first.fit(whole, data())
    first.save_checkpoint(path)
    resumed = [Run(), Run()]
    for run in resumed:
        trainer(plugin(scaling), max_epochs=2).fit(run, data(), ckpt_path=path)
    assert resumed[0].losses == pytest.approx(resumed[1].losses, rel=1e-3)
    assert resumed[0].losses[0] < whole.losses[0]
    checkpoint = torch.load(path, weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "extra_state" in key]


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
@pytest.mark.parametrize("base", ["bf16-mixed", "16-mixed"])
def test_losses_follow_those_of_bf16(scaling: str, base: Any) -> None:
    low, high = Run(), Run()
    trainer(plugin(scaling, base=base), max_epochs=4).fit(low, data())
    trainer(FP8Precision("bf16", base="bf16-mixed"), max_epochs=4).fit(high, data())
    assert sum(low.losses[-8:]) == pytest.approx(sum(high.losses[-8:]), rel=0.02)


def test_clamping_is_counted_as_its_own_debug_statistics_count_it(tmp_path: Path) -> None:
    """Overflows are counted by LogFp8TensorStats under delayed scaling only."""
    inspect = pytest.importorskip("nvdlfw_inspect.api")
    debug = pytest.importorskip("transformer_engine.debug")
    config = tmp_path / "debug.yaml"
    config.write_text(
        "stats:\n"
        "  enabled: True\n"
        "  layers: {layer_name_regex_pattern: .*}\n"
        "  transformer_engine:\n"
        "    LogFp8TensorStats:\n"
        "      enabled: True\n"
        "      tensors_struct:\n"
        "        - {tensor: activation, stats: [overflows%], freq: 1}\n"
    )
    features = str(Path(debug.__file__).parent / "features")
    inspect.initialize(
        config_file=str(config), feature_dirs=[features], log_dir=str(tmp_path / "theirs")
    )
    try:
        monitor = ClampMonitor(every_n_steps=1, sample=1, dirpath=tmp_path)
        trainer(plugin("delayed"), max_steps=8, callbacks=[monitor]).fit(Run(), data())
    finally:
        inspect.end_debug()
    ours = {
        (row["step"], row["layer"]): 100 * row["clamped_fraction"]
        for row in read_statistics(tmp_path).to_pylist()
        if row["operand"] == "input"
    }
    text = "".join(p.read_text() for p in (tmp_path / "theirs").rglob("*statistics*.log"))
    assert "overflows%" in text
    assert ours
    # Their lines: NAME iteration=000001 value=...; the largest of the run must be the same.
    theirs = [float(line.rsplit("=", 1)[1]) for line in text.splitlines() if "overflows%" in line]
    assert max(theirs) == pytest.approx(max(ours.values()), abs=0.1)
