"""`lightning-fp baseline`: a run in high precision, recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_fp.cli import main
from lightning_fp.records import read_baseline, read_loss, read_run

FACTORIES = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.arange(96.0).reshape(12, 8), batch_size=4)

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.dtypes = set()
    def training_step(self, batch, index):
        output = self.layer(batch)
        print(output.dtype)
        return output.square().mean().log()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

class WithData(Module):
    def train_dataloader(self):
        return Data().train_dataloader()

def alone():
    return WithData()

def with_loader():
    return Module(), Data().train_dataloader()

def with_datamodule():
    return Module(), Data(), {"gradient_clip_val": 1.0, "callbacks": L.Callback()}

def without_data():
    return Module()

def a_model():
    return nn.Linear(8, 8), []

def too_much():
    return Module(), Data(), {}, 1

def two_precisions():
    return Module(), Data(), {"precision": "16-mixed"}

def unknown_option():
    return Module(), Data(), {"colour": "red"}

def no_options():
    return Module(), Data(), 3

def no_batches():
    return Module(), DataLoader([])

class Empty(L.LightningModule):
    pass

def without_step():
    return Empty(), Data()

class Unoptimized(WithData):
    def configure_optimizers(self):
        return 3

def without_optimizer():
    return Unoptimized()

def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "baselines_of_a_user.py"
    path.write_text(FACTORIES)
    return str(path)


@pytest.mark.parametrize("factory", ["alone", "with_loader", "with_datamodule"])
def test_it_records_and_says_what(
    factory: str, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    args = ["baseline", f"{factories}:{factory}", "--steps", "7", "--output", str(output)]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "torch.bfloat16" in printed
    assert "loss, mean of 7 steps" in printed
    assert "time of a step, median" in printed
    assert "72" in printed  # parameters
    assert read_loss(output).steps.tolist() == list(range(1, 8))
    found = read_baseline(output)
    assert found.step_seconds is not None
    assert found.grad_norm is not None
    assert read_run(output)[-1].settings["MixedPrecision"] == {"precision": "bf16-mixed"}


def test_a_shorter_one_replaces_a_longer_one_bit_for_bit(
    factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for steps in (6, 4):
        args = ["--steps", str(steps), "--output", str(tmp_path), "--precision", "32-true"]
        assert main(["baseline", f"{factories}:with_loader", *args, "--json"]) == 0
        printed = capsys.readouterr().out
        figures = json.loads(printed[printed.index("{") :])
        assert "torch.float32" in printed
        assert (figures["steps"], figures["precision"]) == (steps, "32-true")
        losses.append(read_loss(tmp_path).values.tolist())
    assert losses[1] == losses[0][:4]
    assert len(read_run(tmp_path)) == 1


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nope", "has no 'nope'"),
        ("broken", "raised RuntimeError: no weights"),
        ("without_data", "there is no training data: return (module, dataloader), or define"),
        ("a_model", "must return a LightningModule, or one and its data, or both and Trainer"),
        ("too_much", "got Module, Data, dict, int"),
        ("two_precisions", "the Trainer options must leave out precision"),
        ("unknown_option", "the Trainer options are refused: "),
        ("no_options", "Trainer options must be a mapping, got 3"),
        ("no_batches", "0 steps left no loss behind"),
        ("without_step", "Empty must have a training_step"),
        ("without_optimizer", "Unknown configuration for model optimizers"),
    ],
)
def test_it_refuses_in_one_line(
    factory: str, message: str, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["baseline", f"{factories}:{factory}", "--steps", "2", "--output", str(tmp_path)]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_steps_must_be_some(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", f"{factories}:alone", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
