"""Every example runs, and prints what it promises."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMISES = {
    "quickstart.py": ([], "formats: {'body.0': 'fp8-dynamic', 'body.2': 'fp8-dynamic'"),
    "plain_loop.py": ([], "converted back: 2 layers, first one is Linear"),
    "detector_plain_loop.py": ([], "continues from a checkpoint: True"),
    "choose_layers.py": ([], "pattern 'block.*' matches no linear layer"),
    "clamp_monitor.py": (["--output", "run"], "More: lightning-fp stats run --layer layers.2"),
    "fallback.py": (["--steps", "240"], "demoted: {'blocks.1.mlp.down': ('fp8-dynamic', 'fp32')}"),
    "rollout.py": (["--steps", "60"], "The run ended in stage cooldown."),
    "fp16_rl_mismatch.py": (["--steps", "4", "--batch", "8"], "early warning:"),
    "rl_matched_precision.py": (
        ["--steps", "4", "--batch", "8", "--pretraining", "4"],
        "k3 of the quantiser alone, where it casts other values:",
    ),
    "lora.py": (["--steps", "4"], "format=fp8-dynamic)"),
    "te_backend.py": ([], "backend: auto\n"),
    "pretraining_loop.py": (
        ["--steps", "4", "--no-compile", "--output", "run"],
        "More: lightning-fp report run",
    ),
    "policy_gradient.py": (
        ["--steps", "4", "--high-until", "2", "--batch", "8", "--output", "run"],
        "ratios at unchanged weights are exactly 1: True",
    ),
    "fabric/gpt.py": (["--steps", "4", "--output", "run"], "held-out loss, in high precision:"),
    "byte_gpt.py": (["--steps", "4"], "resumed run ended with the same weights: True"),
}
ON_TWO_RANKS = {
    "moe.py": "model.layers.0.mlp.experts: bf16",
    "fsdp2.py": "loads into the plain model: <All keys matched successfully>",
    "tensor_parallel.py": "this rank's part of model.0.up: (128, 64) of (256, 64)",
}
"""What `torchrun` starts."""


LONG = "fallback.py", "fp16_rl_mismatch.py"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in PROMISES],
)
def test_example(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    args, promise = PROMISES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "models", raising=False)  # another test's
    monkeypatch.setattr("sys.argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert promise in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_example_under_torchrun(name: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert ON_TWO_RANKS[name] in run.stdout


def test_every_script_is_run():
    here = {name for name in PROMISES if "/" not in name} | ON_TWO_RANKS.keys()
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*here, "models.py"}
    assert {f"fabric/{path.name}" for path in EXAMPLES.glob("fabric/*.py")} == {*PROMISES} - here
