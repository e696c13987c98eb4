"""The findings of a sweep as texts, alike in the terminal and on the page."""

from __future__ import annotations

import math

from lightning_fp.report.draw.parts import duration, number
from lightning_fp.statistic_names import share
from lightning_fp.study.sweep.findings import Findings, FormatFindings, RateFindings
from lightning_fp.study.total_cost import TotalCost

SUMMARY = (
    "failed",
    "stable decades",
    "best lr",
    "final loss",
    "gap",
    "steps to bf16",
    "spikes",
    "a step",
)
"""Columns of the line of a format."""


def format_cells(each: FormatFindings) -> dict[str, str]:
    """The line of a format, by column."""
    best = each.best
    spikes = [rate.spikes for rate in each.rates]
    texts = (
        f"{each.failed}/{each.runs}",
        interval(each.width, each.width_low, each.width_high),
        "none" if best is None else f"{best.lr:g}",
        "" if best is None else number(best.final_loss),
        "" if each.best_gap is None else f"{each.best_gap:+.2%}",
        steps(each.steps_to_reference),
        f"{sum(spikes) / len(spikes):.2g}",
        duration(each.seconds_per_step),
    )
    return dict(zip(SUMMARY, texts, strict=True))


def rate_text(rate: RateFindings) -> str:
    """A failure rate with its interval: "2/5 [12%, 77%]"."""
    return f"{rate.failed}/{rate.runs} [{rate.low:.0%}, {rate.high:.0%}]"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval: "1.25 [0.98, 1.50]"; "" if it is not known."""
    if value is None or low is None or high is None:
        return ""
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def ratio_interval(cost: TotalCost) -> str:
    """The interval of a break-even."""
    low, high = ("none" if math.isinf(end) else f"{end:.2f}" for end in (cost.low, cost.high))
    return f"[{low}, {high}]"


def steps(value: float | None) -> str:
    """Steps until something is reached."""
    if value is None:
        return ""
    return "never" if math.isinf(value) else f"{value:.0f}"


def headline(findings: Findings) -> str:
    """The answer in a few sentences."""
    others = [each for each in findings.formats if each.format != findings.reference]
    own = [each for each in findings.formats if each.format == findings.reference]
    if not own or findings.reference is None:
        return (
            "No format in high precision is among them, so that only divergence counts as failure;"
            " add bf16 to compare with."
        )
    said: list[str] = []
    for each in own:
        said.append(f"{each.name} failed in {each.failed} of {each.runs} runs")
    for each in others:
        text = f"{each.name} in {each.failed} of {each.runs}"
        if each.narrower is not None and each.narrower_low is not None:
            if each.narrower_low > 0:
                text += f", over {each.narrower:.2g} decades less of the learning rate"
            elif each.narrower_high is not None and each.narrower_high < 0:
                text += f", over {-each.narrower:.2g} decades more of the learning rate"
        if each.best_gap is not None:
            text += f", with a final loss {share(abs(each.best_gap)) or '0%'}"
            text += " higher" if each.best_gap > 0 else " lower"
        said.append(text)
    return "; ".join(said) + "."
