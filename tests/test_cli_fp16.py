"""`lightning-fp doctor --fp16`: what becomes of gradients at each loss scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_fp.cli import main

FACTORY = """
import torch
from tests.helper import LanguageModel, text_rows

class Model(LanguageModel):
    def training_step(self, batch, index):
        self.log("loss", 0.0)
        return super().training_step(batch, index)

def lightning():
    return Model(), text_rows(4)

def plain():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    return model, lambda m: (m(torch.ones(2, 8)) * 1e-6).sum()

def alone():
    return torch.nn.Linear(8, 8)
"""


def test_it_advises_on_a_loss_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "models.py"
    source.write_text(FACTORY)
    assert main(["doctor", "--fp16", f"{source}:lightning", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["scale"]: row for row in told["scales"]}
    assert rows[1.0]["subnormal"] > 10 * rows[2.0**16]["subnormal"]
    assert rows[1.0]["overflow"] is None
    assert rows[2.0**24]["overflow"] is not None
    assert "begin with LossScaling(init_scale=" in told["advice"]
    assert main(["doctor", "--fp16", f"{source}:plain"]) == 0
    assert "Gradients in FP16" in capsys.readouterr().out
    assert main(["doctor", "--fp16", f"{source}:alone"]) == 2
    assert "must return (LightningModule, batch)" in capsys.readouterr().err
