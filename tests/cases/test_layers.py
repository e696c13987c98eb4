"""Layers of other people's models: what follows them, what is not ours, what is made anew."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_fp import (
    ClampMonitor,
    DivergenceDetector,
    FP8Precision,
    FP16Precision,
    LayerLimit,
    PrecisionFallback,
    convert,
)
from tests.cases.programs import PLAIN, Program, error, fit, made, rows, weights


class Head(L.LightningModule):
    """A classifier over tokens, whose logits are changed in place."""

    how = "divide"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(inplace=True))
        self.down = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 16)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.head(self.down(self.body(batch)))
        if self.how == "divide":
            logits /= 0.5
        elif self.how == "fill":
            logits[..., 0] = -1e4
        else:
            logits.view(-1, 16).clamp_(-5, 5)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.labels(batch))

    def labels(self, batch: Tensor) -> Tensor:
        return batch.flatten(0, 1).argmax(1) % 15 + 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.compatibility(
    "layers", "outputs changed in place (`ReLU(inplace=True)`, `logits /= T`)", "works"
)
@pytest.mark.parametrize("how", ["divide", "fill", "clamp a view"])
@pytest.mark.parametrize("format", ["fp32", "fp16", "fp8-delayed", "fp8-rowwise", "mxfp8"])
def test_an_output_may_be_changed_in_place(tmp_path: Path, how: str, format: str) -> None:
    data = DataLoader(rows(16, shape=(6, 32)), batch_size=4)
    plain, ours = made(Head, how=how), made(Head, how=how)
    fit(plain, PLAIN, tmp_path, data=data)
    fit(ours, FP8Precision("rowwise", layers={"*head": format}), tmp_path, data=data)
    assert error(weights(ours), weights(plain)) < 0.1


class Mixer(L.LightningModule):
    """Mixes tokens by a linear layer over a transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(16, 16)
        self.channels = nn.Linear(32, 32, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mixed = batch + self.tokens(batch.transpose(1, 2)).transpose(1, 2)
        return torch.relu_(self.channels(mixed)).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.compatibility("layers", "transposed inputs (MLP-Mixer)", "works")
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_layer_that_climbs_takes_its_input_in_every_format_on_the_way(
    tmp_path: Path, evaluated: bool
) -> None:
    data = DataLoader(rows(8 * 48, shape=(16, 32)), batch_size=8)
    limit = LayerLimit(sqnr_db=60.0, patience=1, cooldown=1)
    fallback = PrecisionFallback(
        DivergenceDetector(armed=16), limit=limit, every_n_steps=1, probe_every_n_steps=None
    )
    plugin = FP8Precision("delayed", fp8_eval=evaluated)
    trainer = fit(made(Mixer), plugin, tmp_path, fallback, data=data)
    assert trainer.global_step == 48
    assert "fp8-delayed" not in plugin.precision_map.formats().values()


class Maker(L.LightningModule):
    """Weights made anew for each micro-batch by another network."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(3, 32 * 16) * 0.1)
        self.target = nn.Linear(32, 16, bias=False)
        self.errors: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        weight = self.codes[batch_idx % 3].view(16, 32) * (1 + 3 * (batch_idx % 3))
        output = functional_call(self.target, {"weight": weight}, (batch,))
        self.errors.append(error(output.detach(), batch @ weight.detach().t()))
        return output.float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.compatibility("layers", "weights made for each micro-batch (hypernetworks)", "works")
@pytest.mark.parametrize("scaling", ["delayed", "dynamic"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_product_is_with_its_own_weight(tmp_path: Path, scaling: str, accumulate: int) -> None:
    module = made(Maker)
    data = DataLoader(rows(8 * 24), batch_size=8)
    fit(module, FP8Precision(scaling), tmp_path, data=data, accumulate_grad_batches=accumulate)
    assert max(module.errors[6:]) < 0.15


class Recurrent(L.LightningModule):
    """A recurrent core does nearly all of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.core = self.make()
        self.out = nn.Linear(128, 16)
        self.example_input_array = torch.zeros(2, 8, 32)

    @staticmethod
    def make() -> nn.Module:
        return nn.LSTM(32, 128, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(x)[0])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Gated(Recurrent):
    @staticmethod
    def make() -> nn.Module:
        return nn.GRU(32, 128, batch_first=True, bidirectional=False)


class Paired(Recurrent):
    @staticmethod
    def make() -> nn.Module:
        return nn.Bilinear(32, 32, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(x, x))


@pytest.mark.compatibility(
    "layers", "LSTM, GRU, Bilinear", "works with a note", "left in high precision, and counted"
)
@pytest.mark.parametrize(
    ("kind", "name", "core"),
    [
        (Recurrent, "LSTM", 4 * 128 * (32 + 128) + 4 * 128 * (128 + 128)),
        (Gated, "GRU", 3 * 128 * (32 + 128)),
        (Paired, "Bilinear", 32 * 32 * 128),
    ],
)
def test_the_share_said_is_that_of_the_model(
    tmp_path: Path, kind: type[Recurrent], name: str, core: int
) -> None:
    plugin = FP8Precision("dynamic", base="32-true")  # not every CPU has an LSTM in bf16
    fit(made(kind), plugin, tmp_path, data=DataLoader(rows(8, shape=(8, 32)), batch_size=4))
    assert plugin.report is not None
    own = 128 * 16
    assert plugin.report.flops_share == pytest.approx(own / (own + core), abs=0.05)
    assert name in plugin.report.summary()


@pytest.mark.compatibility(
    "layers", "`Conv1D` of GPT-2", "works with a note", "left in high precision, named"
)
def test_projections_that_are_no_linear_layers_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    with pytest.raises(ValueError, match="Conv1D"):
        convert(transformers.GPT2LMHeadModel(config), "fp8-dynamic")


class Lazy(Program):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LazyLinear(48), nn.GELU(), nn.LazyLinear(32))


@pytest.mark.compatibility("layers", "`nn.LazyLinear`", "works")
@pytest.mark.parametrize(
    "plugin",
    [
        lambda: FP8Precision("dynamic"),
        lambda: FP8Precision("delayed", layers={"body.0": "fp8-rowwise"}),
        lambda: FP16Precision(),
    ],
)
def test_a_lazy_layer_becomes_one_of_the_table(tmp_path: Path, plugin: Any) -> None:
    plain, ours, given = made(Lazy), made(Lazy), plugin()
    fit(plain, PLAIN, tmp_path)
    fit(ours, given, tmp_path)
    assert ours.body[0].weight.shape == (48, 32)
    assert set(given.precision_map.formats()) >= {"body.0", "body.2"}
    assert error(weights(ours), weights(plain)) < 0.05


class Hooked(Program):
    """A layer that was given a forward of its own, as offloading hooks do."""

    def __init__(self) -> None:
        super().__init__()
        inner = self.body[0].forward
        self.body[0].forward = lambda x: inner(x) * 2


@pytest.mark.compatibility(
    "layers", "a forward of its own in the instance", "works with a note", "left alone, named"
)
def test_a_layer_with_a_forward_of_its_own_is_not_said_to_be_low(tmp_path: Path) -> None:
    module, plugin = made(Hooked), FP8Precision("dynamic")
    fit(module, plugin, tmp_path)
    assert "body.0" not in plugin.precision_map.formats()
    assert plugin.report is not None
    [row] = [row for row in plugin.report.layers if row.name == "body.0"]
    assert row.reason is not None
    assert "forward" in row.reason


class Replace(L.Callback):
    """Another layer in the place of a converted one, when the optimizers are there already."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        torch.manual_seed(3)
        module.body[0] = nn.Linear(32, 48)
        trainer.strategy.setup_optimizers(trainer)


@pytest.mark.compatibility(
    "layers",
    "a layer replaced in `on_train_start`",
    "works with a note",
    "the new one is not converted; a line at the first step says so",
)
@pytest.mark.parametrize("scaling", ["high", "dynamic", "delayed"])
def test_a_replaced_layer_leaves_the_table(tmp_path: Path, scaling: Any) -> None:
    plain, ours, plugin = made(Program), made(Program), FP8Precision(scaling)
    fit(plain, PLAIN, tmp_path, Replace(), max_epochs=2)
    around = [Replace(), PrecisionFallback(), ClampMonitor(every_n_steps=1, sample=1)]
    said = nullcontext() if scaling == "high" else pytest.warns(match="body.0: replaced or")
    with said:
        fit(ours, plugin, tmp_path, *around, max_epochs=2)
    assert plugin.precision_map.formats().keys() == {"body.2", "head"}
    assert plugin.report is not None
    assert "body.0" not in [row.name for row in plugin.report.converted]
    with pytest.raises(ValueError, match="matches no linear layer"):
        plugin.precision_map.set("body.0", "bf16")
    [fallback] = [each for each in around if isinstance(each, PrecisionFallback)]
    assert fallback.supervisor is not None
    assert fallback.supervisor.failed_at is None
    assert torch.equal(weights(ours), weights(plain)) is (scaling == "high")
