"""README: its code runs, and its figures are those of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return (self.body(x) - x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("blocks", range(1, len(CODE) + 1))
def test_what_stands_there_trains(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece of code, after those before it, with the fit of the first."""
    monkeypatch.chdir(tmp_path)
    for option, value in {"accelerator": "cpu", "max_steps": "4"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", value)
    data = DataLoader(torch.randn(64, 32), batch_size=8)
    names = {"model": Net(), "data": data}
    for code in CODE[:blocks]:
        exec(code.replace("trainer.fit", "# "), names)
    exec("trainer.fit(model, data)", names)
    assert (tmp_path / "lightning_logs" / "version_0" / "run.jsonl").is_file()


def test_the_first_piece_has_four_lines_and_fits() -> None:
    lines = [line for line in CODE[0].splitlines() if line]
    assert len(lines) == 4
    assert lines[-1].startswith("trainer.fit(model, data)")


@pytest.mark.parametrize(
    ("said", "measured"),
    [
        ("200 of 200", ["90/90", "110/110"]),
        ("In 180 runs", ["0/120 [0%, 3%]", "1/60 [0%, 9%]"]),
        ("it was 0 of 40", ["0/40 [0%, 9%] each of the first three"]),
        ("77% of the layers", ["nothing left in FP8 (the fallback leaves 77%)"]),
        ("1.6% of a step", ["| 1.016, 1.019 (5) |"]),
        ("one 2.0 MB HTML file", ["| 0.75 GB; 2.0 MB |"]),
        ("0.50 of the bytes", ["| ≤ 0.55 | 0.50 |"]),
        ("1.01 times", ["| ≤ 1.02 | 1.01 |"]),
        ("2% for `ClampMonitor` (1% in compiled", ["**1.021, not reached**", "| 1.008 (3) |"]),
        ("49 bytes", ["| stated | 49 |"]),
    ],
)
def test_figures_are_those_of_the_benchmarks(said: str, measured: list[str]) -> None:
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text()
    assert said in TEXT.replace("\n  ", " ")
    assert all(figure in benchmarks for figure in measured)


def test_its_files_are_there() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (ROOT / target).exists(), target
