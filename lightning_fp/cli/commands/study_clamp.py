"""Tell whether loss spikes come from clamping: from a run's records, or by an A/B (--ab)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightning_fp.cli.commands.plan import parse_rules
from lightning_fp.cli.loading import find_factory
from lightning_fp.cli.output import console, print_json
from lightning_fp.counting import counted
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.records import read_statistics
from lightning_fp.report.draw.sparkline import sparkline
from lightning_fp.study import ClampAB, ClampSpikes, SpikeRule, clamp_ab, clamp_spikes, read_loss
from lightning_fp.study.alignment import Correction
from lightning_fp.study.series import Statistic
from lightning_fp.terminal import FittedTable

_CURVE = 20
"""Characters of a curve in a table."""


# `json` is the name of the option.
def run(
    *,
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
    output: str,
    json: bool,
) -> int:
    """Print the analysis of a run, or train the A/B and print its verdict; `commands.study_clamp`.

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
                output=Path(output),
            )
        if json:
            print_json(compared.to_dict())
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
        print_json(found.to_dict())
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
        where = f"layer, operand, -{found.window} to +{found.window} steps"
        grid = FittedTable(title, where, *numbers, right=numbers)
        for tie in found.ties[:top]:
            grid.add_row(
                Text(f"{tie.layer}\n{tie.operand} {sparkline(tie.curve, _CURVE)}"),
                _text(tie.before, form),
                _text(tie.elsewhere, form),
                str(tie.samples),
                f"{tie.p_value:.2g}",
                f"{tie.p_corrected:.2g}",
                style="" if tie.p_corrected < 0.05 else "dim",
            )
        screen.print(grid)
    notes = [f"a row of the statistics covers {counted(found.resolution, 'step')}"]
    if found.silent:
        notes.append(f"{found.silent} operands never clamped")
    if found.outside:
        notes.append(f"{found.outside} spikes are at steps without statistics")
    screen.print("; ".join(notes), style="dim", markup=False, soft_wrap=True)


def _print_ab(compared: ClampAB, output: str, screen: Console) -> None:
    a, b = compared.a, compared.b
    grid = FittedTable("", "", f"A: {a.format}", f"B: {b.format}")
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
    grid.add_row("loss", sparkline(a.losses, _CURVE), sparkline(b.losses, _CURVE))
    screen.print(grid)
    screen.print(compared.verdict, markup=False, soft_wrap=True)
    screen.print(f"Written to {output}", style="dim", markup=False, soft_wrap=True)


def _text(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)
