"""Train a small GPT in BF16 and FP8; then roll FP8 out by a recipe, with faults on the way."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_fp.cli.output import console
from lightning_fp.demo import DemoOptions, run_demo
from lightning_fp.demo.clamping import clamp_table
from lightning_fp.demo.rollout import rollout_table, run_rollout
from lightning_fp.demo.summary import findings, summary_table
from lightning_fp.records.jsonl import json_text
from lightning_fp.report import terminal_summary

_DEFAULTS = DemoOptions()


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options; see `DemoOptions`."""
    parser.add_argument(
        "--output", type=Path, default=_DEFAULTS.output, help="directory to write to"
    )
    parser.add_argument(
        "--steps", type=int, default=_DEFAULTS.steps, help="optimizer steps of each run"
    )
    parser.add_argument(
        "--scaling", type=str, default=_DEFAULTS.scaling, help="format of the FP8 runs"
    )
    parser.add_argument(
        "--batch-size", type=int, default=_DEFAULTS.batch_size, help="sequences per step"
    )
    parser.add_argument("--context", type=int, default=_DEFAULTS.context, help="bytes per sequence")
    parser.add_argument(
        "--seed", type=int, default=_DEFAULTS.seed, help="seed of weights and batches"
    )
    parser.add_argument(
        "--rollout", type=bool, default=True, help="whether to run the second part, with the recipe"
    )


def run(
    output: Path,
    steps: int,
    scaling: str,
    batch_size: int,
    context: int,
    seed: int,
    rollout: bool,
) -> int:
    """Run the demo and print what it found.

    Returns:
        0, or 1 if the resumed run did not end as the uninterrupted one, or the fallback did not
        save the run with the faults.
    """
    options = DemoOptions(
        output=output,
        steps=steps,
        scaling=scaling,
        batch_size=batch_size,
        context=context,
        seed=seed,
    )
    screen = console()
    result = run_demo(options, screen)
    screen.print()
    screen.print(summary_table(result))
    screen.print(clamp_table(result.clamping))
    for line in findings(result):
        screen.print(f"• {line}")
    screen.print(f"• Written to {output}: losses.csv, summary.json, {options.checkpoint.name};")
    screen.print(f"  the clamp log: lightning-fp stats {options.clamp_log(options.other_scaling)}")
    saved = not rollout or _rollout(output, seed, screen)
    return 0 if result.resume_is_exact and saved else 1


def _rollout(output: Path, seed: int, screen: Console) -> bool:
    """The second part; whether the protected run ended within 1% of high precision."""
    result = run_rollout(output, screen, seed=seed)
    screen.print()
    screen.print(rollout_table(result))
    (output / "rollout.json").write_text(json_text(result.to_dict()) + "\n")
    terminal_summary([result.run_dir], screen, baseline=result.baseline)
    screen.print(f"• Step by step: {result.run_dir}/events.jsonl; docs/when-a-run-diverges.md")
    screen.print(f"• The report: {result.report}")
    return result.gap(result.rescued) < 0.01
