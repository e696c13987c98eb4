"""Train a small GPT in BF16 and FP8; then roll FP8 out by a recipe, with faults on the way."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from lightning_fp.cli.output import console, print_json
from lightning_fp.demo import DemoOptions, run_demo
from lightning_fp.demo.clamping import clamp_table
from lightning_fp.demo.rollout import RolloutResult, rollout_table, run_rollout
from lightning_fp.demo.summary import findings, summary_table
from lightning_fp.records.jsonl import json_text
from lightning_fp.report import terminal_summary


def run(
    output: str,
    steps: int,
    scaling: str,
    batch_size: int,
    context: int,
    seed: int,
    *,
    rollout: bool,
    json: bool,
) -> int:
    """Run the demo and print what it found; see `commands.demo`.

    Returns:
        0, or 1 if the resumed run did not end as the uninterrupted one, or the fallback did not
        save the run with the faults.
    """
    directory = Path(output)
    options = DemoOptions(
        output=directory,
        steps=steps,
        scaling=scaling,
        batch_size=batch_size,
        context=context,
        seed=seed,
    )
    screen = console(stderr=json)
    result = run_demo(options, screen)
    screen.print()
    screen.print(summary_table(result))
    screen.print(clamp_table(result.clamping))
    for line in findings(result):
        screen.print(f"• {line}")
    screen.print(
        f"• Written to {output}: losses.csv, summary.json, {options.checkpoint.name};",
        soft_wrap=True,
    )
    clamp_log = options.clamp_log(options.other_scaling)
    screen.print(f"  the clamp log: lightning-fp stats {quote(str(clamp_log))}", soft_wrap=True)
    found: dict[str, Any] = result.to_dict()
    saved = True
    if rollout:
        rolled_out = _rollout(directory, seed, screen)
        found["rollout"] = rolled_out.to_dict()
        saved = rolled_out.gap(rolled_out.rescued) < 0.01  # within 1% of high precision
    if json:
        print_json(found)
    return 0 if result.resume_is_exact and saved else 1


def _rollout(output: Path, seed: int, screen: Console) -> RolloutResult:
    """The second part."""
    result = run_rollout(output, screen, seed=seed)
    screen.print()
    screen.print(rollout_table(result))
    (output / "rollout.json").write_text(json_text(result.to_dict()) + "\n")
    terminal_summary([result.run_dir], screen, baseline=result.baseline)
    where = f"{result.run_dir}/events.jsonl"
    screen.print(f"• Step by step: {where}", soft_wrap=True)
    screen.print('  what it means: the page "When a run diverges" of the documentation')
    screen.print(f"• The report: {result.report}", soft_wrap=True)
    return result
