"""What commands print on 80 columns and into a pipe, as committed screens; and their JSON.

To renew the screens after a change: SCREENS=write pytest tests/test_cli_screens.py
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lightning_fp.cli import main
from lightning_fp.cli.commands.doctor import FORMATS
from lightning_fp.cli.output import print_json
from lightning_fp.records import LossRow, LossWriter, StatisticsWriter
from tests.report.large_run import write_large_run

SCREENS = Path(__file__).parent / "screens"
MODELS = Path(__file__).parents[1] / "examples" / "models.py"
POLICY = """
import torch
from tests.helper import TinyGPT

def policy():
    torch.manual_seed(0)
    return TinyGPT(), torch.arange(60).view(4, 15)

def scale():
    model = torch.nn.Linear(8, 8)
    return model, lambda m: (m(torch.ones(2, 8)) * 1e-6).sum()
"""


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of runs with clamping, in this directory, so that their paths are always the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("policies.py").write_text(POLICY)
    write_large_run(Path("large"), layers=24, intervals=10)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)] + ["model.layers.1.mlp.up"]
    writer = StatisticsWriter("run")
    for step in range(1, 161):
        spiky = step % 40 == 0
        writer.append(
            {
                "step": [step] * 3,
                "layer": names,
                "operand": ["input", "grad_output", "input"],
                "format": ["fp8-delayed"] * 3,
                "amax": [1.0 + step / 100] * 3,
                "headroom_bits": [0.5, -1.0, math.nan],
                "nonfinite": [0, 1, 0],
                "clamped_mass": [0.2 if spiky else 0.0, 0.001 * (step % 7), 0.0],
                "underflow_fraction": [0.0, 0.4, 0.0],
                "sqnr_db": [math.inf, 20.0, 10.0],
            }
        )
    writer.flush()
    losses = [2.0 + 0.01 * math.sin(step) + (step % 40 == 0) for step in range(1, 161)]
    LossWriter("run").append(
        [LossRow(step=i, loss=loss, seconds=0.1) for i, loss in enumerate(losses, start=1)]
    )


def screen(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What a command prints into a pipe."""
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    lines = [row.rstrip() for row in printed.splitlines()]
    dates = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")
    return dates.sub("2000-01-01 00:00", "\n".join(lines)) + "\n"


def assert_tables_fit(printed: str) -> None:
    """No row is wider than 80 columns; sentences are whole, for the terminal to wrap."""
    for part in printed.split("─\n")[1:]:
        assert all(len(row) <= 80 for row in part.split("\n\n")[0].splitlines())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("recipes-list", "recipes list"),
        ("recipes-check", "recipes check conservative"),
        ("recipes-check-model", "recipes check balanced --model tests.helper:TinyGPT"),
        ("plan", f"plan {MODELS}:mixture_of_experts --cuda-fp8 --layers *_proj=fp8-dynamic"),
        ("plan-hardware", f"plan {MODELS}:llama_like --hardware h100 --devices 8"),
        ("stats", "stats run --top 2"),
        ("stats-layer", "stats run --layer *.1.*"),
        ("study-clamp", "study clamp run --window 4"),
        ("report", "report large"),
    ],
)
def test_screens(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = screen(capsys, line)
    file = SCREENS / f"{name}.txt"
    if os.environ.get("SCREENS") == "write":
        file.write_text(printed, encoding="utf-8")
    assert printed == file.read_text(encoding="utf-8")
    assert_tables_fit(printed)


def test_where_only_ascii_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an old console: the rest of the characters become question marks."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["report", "large"]) == 0
    out.flush()
    assert b"loss  ????" in out.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("doctor", [*FORMATS, "native", "emulated"]),
        ("doctor --fp16 policies.py:scale", ["subnormal", "0.00%"]),
        ("mismatch policies.py:policy --device cpu", ["fp8-dynamic", "rollout", "E|sum r|"]),
        ("report large run", ["24 fp8-delayed", "layers in low precision"]),
    ],
)
def test_no_word_is_broken(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = screen(capsys, line)
    for word in words:
        assert word in printed
    assert_tables_fit(printed)


def not_json(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def told(capsys: pytest.CaptureFixture[str], line: str) -> Any:
    assert main(line.split()) == 0
    return json.loads(capsys.readouterr().out, parse_constant=not_json)


def test_json_of_each_command_that_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = told(capsys, "recipes list --json")["recipes"]
    assert recipes[1]["name"] == "balanced"
    assert recipes[1]["stages"] == ["high", "all-but-ends", "all"]
    assert told(capsys, "recipes check balanced --json")["recipe"]["name"] == "balanced"
    (run,) = told(capsys, "report large --json")["runs"]
    assert run["cost"]["attempted"] == run["steps"] == 160
    assert {"demote", "promote"} <= {event["kind"] for event in run["events"]}
    assert run["worst"]["clamped_mass"][0]["layer"] == "model.blocks.3.qkv"
    assert [layer["layer"] for layer in told(capsys, "stats run --json")["worst"]["sqnr_db"]]
    curves = told(capsys, "stats run --layer *.0.* --json")["layers"]
    assert curves["model.layers.0.self_attn.q_proj"]["input"]["sqnr_db"][0] is None
    assert told(capsys, "study clamp run --window 4 --json")["ties"]
    assert told(capsys, "mismatch policies.py:policy --device cpu --json")["tokens"] == 56
    assert told(capsys, "doctor --fp16 policies.py:scale --json")["advice"]


@pytest.mark.slow
def test_json_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--steps 4 --batch-size 2 --context 16"
    assert main(f"demo --output demo --rollout false {small} --json".split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out, parse_constant=not_json)["resume_is_exact"]
    assert "ended bit for bit as the uninterrupted run" in captured.err


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.nan, {"b": -math.inf}], 3: (1.5, "NaN")})
    assert json.loads(capsys.readouterr().out, parse_constant=not_json) == {
        "a": [None, {"b": None}],
        "3": [1.5, "NaN"],
    }
