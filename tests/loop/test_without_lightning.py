"""Where Lightning is not installed: a plain loop with all its parts, and the report of its run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
    import sys


    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)


    sys.meta_path.insert(0, NotInstalled())

    import torch
    from torch import nn

    from lightning_fp.loop import PrecisionLoop
    from lightning_fp.recipes import RolloutRecipe, Stage
    from lightning_fp.records import read_events, read_loss, read_run, read_statistics
    from lightning_fp.report import read_records, terminal_summary, write_report

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recipe = RolloutRecipe(
        name="two",
        stages=(
            Stage(name="high", layers={"*": "high"}, until={"steps": 4}),
            Stage(name="low", layers={"*": "configured"}),
        ),
    )
    loop = PrecisionLoop(
        model,
        optimizer,
        "delayed",
        recipe=recipe,
        clip_norm=1.0,
        monitor={"every_n_steps": 2, "log_every_n_steps": 4},
        dirpath="run",
    )
    for step in range(16):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        loop.step(lambda b: (model(b[0]) - b[1]).square().mean(), [(x, x.sin()), (x + 1, x.cos())])
        loop.log("step", step)
    assert loop.stage == "low" and loop.steps.attempted == 16
    with loop.as_trained(), torch.no_grad():
        model(x)
    with loop.evaluation():
        model(x)
    loop.close()

    kinds = {event.kind for event in read_events("run")}
    assert {"stage", "rehearsal"} <= kinds, kinds
    assert read_statistics("run").num_rows > 0 and len(read_loss("run").steps) == 16
    (start,) = read_run("run")
    assert set(start.settings) == {
        "PrecisionLoop", "ClampMonitor", "PrecisionFallback", "StagedRollout"
    }
    write_report(["run"], "report.html")
    assert "PrecisionLoop" in open("report.html", encoding="utf-8").read()
    print("all of it, and no", sorted(m for m in sys.modules if m.startswith("lightning.")))
"""


def test_a_plain_loop_and_its_report(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all of it, and no []\n"
