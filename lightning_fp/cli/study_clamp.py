"""Tell whether loss spikes come from clamping: from a run's records, or by an A/B (--ab)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_fp.cli.loading import find_factory
from lightning_fp.cli.output import console, table
from lightning_fp.cli.plan import parse_rules
from lightning_fp.cli.stats import sparkline
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.records import read_statistics
from lightning_fp.records.jsonl import json_text
from lightning_fp.study import ClampAB, ClampSpikes, SpikeRule, clamp_ab, clamp_spikes, read_loss
from lightning_fp.study.alignment import Correction
from lightning_fp.study.series import Statistic

_RULE = SpikeRule()


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments: of the analysis, of the A/B, of both."""
    parser.add_argument(
        "run", nargs="?", type=str, default=None, help="directory that ClampMonitor wrote to"
    )
    parser.add_argument(
        "--loss",
        type=str,
        default=None,
        help="the run's loss: a CSVLogger's metrics.csv, or Parquet or CSV with two columns, step"
        " and loss; by default loss.csv (of ClampMonitor) or metrics.csv in the run's directory",
    )
    parser.add_argument(
        "--column", type=str, default="train_loss", help="name of the loss in metrics.csv"
    )
    parser.add_argument(
        "--statistic",
        type=Statistic,
        default="clamped_mass",
        help="clamped_mass, on sampled steps; or overflow_bits, exact at every step under delayed"
        " scaling",
    )
    parser.add_argument(
        "--window", type=int, default=8, help="steps before and after a spike to look at"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=_RULE.threshold,
        help="height of a spike above the running median, in robust standard deviations",
    )
    parser.add_argument(
        "--refractory",
        type=int,
        default=_RULE.refractory,
        help="calm steps after which the next outlier is a new spike",
    )
    parser.add_argument(
        "--correction",
        type=Correction,
        default="max",
        help="of p-values for the number of operands: max or holm",
    )
    parser.add_argument(
        "--begin", type=int, default=0, help="leave out the steps before, e.g. the warm-up"
    )
    parser.add_argument("--top", type=int, default=10, help="how many operands to show")
    parser.add_argument(
        "--ab",
        type=str,
        default=None,
        metavar="MODULE:FACTORY",
        help="train twice instead: the factory takes nothing and returns a LightningModule, a"
        " dataloader and, if wanted, a mapping of Trainer options",
    )
    parser.add_argument(
        "--layers",
        action="append",
        default=[],
        metavar="PATTERN",
        help="with --ab: the suspected layers, which clamp in run A and do not in B; repeatable",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="with --ab: a layer rule of both runs; all other layers are on fp8-delayed",
    )
    parser.add_argument("--steps", type=int, default=200, help="with --ab: length of each run")
    parser.add_argument("--seed", type=int, default=0, help="with --ab: seed of both runs")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/clamp_ab"), help="with --ab: where records go"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


# `json` is the name of the option.
def run(
    run: str | None,
    loss: str | None,
    column: str,
    statistic: Statistic,
    window: int,
    threshold: float,
    refractory: int,
    correction: Correction,
    begin: int,
    top: int,
    ab: str | None,
    layers: Sequence[str],
    rule: Sequence[str],
    steps: int,
    seed: int,
    output: Path,
    json: bool,
) -> int:
    """Print the analysis of a run, or train the A/B and print its verdict.

    Raises:
        ValueError: for what the user can put right.
    """
    if (run is None) == (ab is None):
        raise ValueError("give either RUN, a directory with records, or --ab MODULE:FACTORY")
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    spike_rule = SpikeRule(threshold=threshold, refractory=refractory)
    if ab is not None:
        with quiet_lightning():
            compared = clamp_ab(
                find_factory(ab),
                layers,
                steps=steps,
                seed=seed,
                rules=parse_rules(rule),
                spike_rule=spike_rule,
                output=output,
            )
        if json:
            print(json_text(compared.to_dict()))
        else:
            _print_ab(compared, output, console())
        return 0
    assert run is not None
    if layers or rule:
        raise ValueError("--layers and --rule belong to --ab; the analysis looks at all layers")
    try:
        statistics = read_statistics(run)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    found = clamp_spikes(
        statistics,
        read_loss(run, file=loss, column=column),
        statistic=statistic,
        window=window,
        rule=spike_rule,
        correction=correction,
        begin=begin,
    )
    if json:
        print(json_text(found.to_dict()))
    else:
        _print_ties(found, top, console())
    return 0


def _print_ties(found: ClampSpikes, top: int, screen: Console) -> None:
    screen.print(found.summary(), markup=False, soft_wrap=True)
    if found.ties:
        mass = found.statistic == "clamped_mass"
        form = "{:.3%}" if mass else "{:.2f}"
        title = "Clamped mass around loss spikes" if mass else "Overflow in bits around loss spikes"
        numbers = ("up to spikes", "elsewhere", "samples", "p", "corrected p")
        course = f"-{found.window} to +{found.window} steps"
        grid = table(title, "layer", "operand", *numbers, course, right=numbers)
        for tie in found.ties[:top]:
            grid.add_row(
                tie.layer,
                tie.operand,
                _text(tie.before, form),
                _text(tie.elsewhere, form),
                str(tie.samples),
                f"{tie.p_value:.2g}",
                f"{tie.p_corrected:.2g}",
                sparkline(tie.curve),
                style="" if tie.p_corrected < 0.05 else "dim",
            )
        screen.print(grid)
    plural = "" if found.resolution == 1 else "s"
    notes = [f"a row of the statistics covers {found.resolution} step{plural}"]
    if found.silent:
        notes.append(f"{found.silent} operands never clamped")
    if found.outside:
        notes.append(f"{found.outside} spikes are at steps without statistics")
    screen.print("; ".join(notes), style="dim", markup=False, soft_wrap=True)


def _print_ab(compared: ClampAB, output: Path, screen: Console) -> None:
    a, b = compared.a, compared.b
    grid = table("", "", f"A: {a.format}", f"B: {b.format}")
    for name, field, form in (
        ("final loss", "final_loss", "{:.4g}"),
        ("loss spikes", "spikes", "{}"),
        ("steps not finite", "nonfinite_steps", "{}"),
        ("clamped mass, mean", "clamped_mass", "{:.3%}"),
        ("clamped mass, largest", "clamped_mass_max", "{:.2%}"),
        ("overflow, largest (bits)", "overflow_bits", "{:.2f}"),
        ("gradient norm, median", "grad_norm", "{:.3g}"),
        ("gradient norm, largest", "grad_norm_max", "{:.3g}"),
    ):
        grid.add_row(name, form.format(getattr(a, field)), form.format(getattr(b, field)))
    grid.add_row("loss", sparkline(a.losses), sparkline(b.losses))
    screen.print(grid)
    screen.print(compared.verdict, markup=False, soft_wrap=True)
    screen.print(f"Written to {output}", style="dim", markup=False, soft_wrap=True)


def _text(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)
