"""From evidence to action: a rollout recipe with the format that passed, and what every one did.

A format passes if at the learning rate that is best for high precision no larger share of its runs
fails, and its loss ends at most 1% higher. That is little, and no certificate: the recipe's gates
go on asking while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_fp.recipes import FormatEvidence, RolloutRecipe, Stage, balanced
from lightning_fp.recipes.stage import CONFIGURED
from lightning_fp.study.sweep.findings import (
    ALIKE,
    Findings,
    FormatFindings,
    RateFindings,
    reference_of,
)


def recipe_of(findings: Findings) -> RolloutRecipe:
    """The recipe that a sweep speaks for.

    Args:
        findings: of the sweep; of the formats that pass the recipe has the first.

    Raises:
        ValueError: if there is no high precision to compare with, or nothing beside it.
    """
    names = list(dict.fromkeys(each.format for each in findings.formats))
    others = formats_to_judge(names)
    evidence = tuple(evidence_of(name, findings) for name in others)
    passed = [each.format for each in evidence if each.passed]
    if not passed:
        return RolloutRecipe(
            name="from-sweep",
            description="No format has passed: everything stays in high precision.",
            stages=(Stage(name="high", layers={"*": "high"}),),
            evidence=evidence,
        )
    recipe = balanced()
    return RolloutRecipe(
        name="from-sweep",
        description=f"High precision, then {passed[0]}, which has passed a sweep of short runs.",
        stages=tuple(replace(s, layers=_in(s.layers, passed[0])) for s in recipe.stages),
        few_blocks=recipe.few_blocks,
        evidence=evidence,
    )


def formats_to_judge(formats: Sequence[str]) -> list[str]:
    """Those that are not what they are compared with.

    Args:
        formats: all of a sweep.

    Raises:
        ValueError: if there is no high precision to compare with, or nothing beside it.
    """
    reference = reference_of(formats)
    if reference is None:
        raise ValueError("--emit needs bf16 among the formats, to compare the others with")
    others = [name for name in formats if name != reference]
    if not others:
        raise ValueError(f"--emit needs a format beside {reference}")
    return others


def evidence_of(format: str, findings: Findings) -> FormatEvidence:
    """What the sweep has shown of one format; under all settings of further axes at once."""
    own = [each for each in findings.formats if each.format == format]
    high = {e.setting: e for e in findings.formats if e.format == findings.reference}
    whys = [_why_not(each, high.get(each.setting)) for each in own]
    passing = [_passing(each, high.get(each.setting)) for each in own]
    rates = sorted(set(passing[0]).intersection(*passing[1:]))
    gaps = [gap for each in own if (gap := _gap_at_best(each, high.get(each.setting))) is not None]
    return FormatEvidence(
        format=format,
        passed=not any(whys),
        failed=sum(each.failed for each in own),
        runs=sum(each.runs for each in own),
        steps=findings.steps,
        lr_low=rates[0] if rates else None,
        lr_high=rates[-1] if rates else None,
        gap=round(max(gaps), 6) if gaps else None,
        why=next((why for why in whys if why), ""),
    )


def _why_not(each: FormatFindings, high: FormatFindings | None) -> str:
    if high is None or high.best is None:
        return "there is no high precision to compare it with that trains"
    here = _at(each.rates, high.best.lr)
    where = f"at lr {high.best.lr:g}"
    if here is None:
        return f"it was not run {where}, which is best for {high.format}"
    if here.rate > high.best.rate:
        return (
            f"{where} {here.failed} of {here.runs} runs fail, of {high.format}"
            f" {high.best.failed} of {high.best.runs}"
        )
    if here.gap is None or here.gap > ALIKE:
        gap = "unknown" if here.gap is None else f"{here.gap:.1%} higher"
        return f"{where} its final loss is {gap}"
    return ""


def _passing(each: FormatFindings, high: FormatFindings | None) -> list[float]:
    """The learning rates at which it trains as well as high precision."""
    passing: list[float] = []
    for here in each.rates:
        there = None if high is None else _at(high.rates, here.lr)
        if there is None or here.gap is None:
            continue
        if here.rate <= min(there.rate, 0.5) and here.gap <= ALIKE:
            passing.append(here.lr)
    return passing


def _gap_at_best(each: FormatFindings, high: FormatFindings | None) -> float | None:
    if high is None or high.best is None:
        return None
    here = _at(each.rates, high.best.lr)
    return None if here is None else here.gap


def _at(rates: Sequence[RateFindings], lr: float) -> RateFindings | None:
    return next((rate for rate in rates if rate.lr == lr), None)


def _in(layers: object, format: str) -> dict[str, str]:
    assert isinstance(layers, dict)
    return {pattern: format if to == CONFIGURED else to for pattern, to in layers.items()}
