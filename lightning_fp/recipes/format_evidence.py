"""What short runs have shown of the formats that a recipe uses, or had better not use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_fp.argument_types import checked
from lightning_fp.counting import counted
from lightning_fp.layers.format import linear_format
from lightning_fp.layers.histories.auto_scaling import DELAYED_TOKEN_LIMIT
from lightning_fp.shown import shown

_AT_ALL_COSTS = "take StagedRollout(..., force=True), or the evidence out of the recipe"


@checked
@dataclass(frozen=True, kw_only=True)
class FormatEvidence:
    """One format, as `lightning-fp study sweep --emit` has seen it."""

    format: str
    """Its name."""

    passed: bool
    """Whether it trained as well as high precision."""

    failed: int
    """Runs that failed, over all learning rates."""

    runs: int
    """All runs."""

    steps: int
    """Of each run."""

    lr_low: float | None = None
    """The lowest learning rate at which it trained as well."""

    lr_high: float | None = None
    """The highest one."""

    gap: float | None = None
    """By what share its final loss was above high precision's, at the latter's best rate."""

    why: str = ""
    """Why it did not pass."""

    def __post_init__(self) -> None:
        where = f"evidence of {self.format!r}"
        if not isinstance(self.format, str) or not self.format:
            raise ValueError(f"evidence: format must be a name, got {shown(self.format)}")
        try:
            linear_format(self.format)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(self.passed, bool):
            raise ValueError(f"{where}: passed must be true or false, got {shown(self.passed)}")
        for name in ("failed", "runs", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{where}: {name} must be a count, got {shown(value)}")
        for name in ("lr_low", "lr_high", "gap"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise ValueError(f"{where}: {name} must be a finite number, got {shown(value)}")
        if not isinstance(self.why, str):
            raise ValueError(f"{where}: why must be a text, got {shown(self.why)}")

    def sentence(self) -> str:
        """E.g. "e8m3 failed in 4 of 15 runs of 200 steps: ..."."""
        why = f": {self.why}" if self.why else ""
        return (
            f"{self.format} failed in {self.failed} of {counted(self.runs, 'run')} of"
            f" {counted(self.steps, 'step')}{why}"
        )


def against_evidence(
    evidence: Sequence[FormatEvidence], formats: Iterable[str]
) -> list[FormatEvidence]:
    """What a recipe's evidence has against formats.

    Args:
        evidence: the recipe's.
        formats: all that its stages come to on the model.
    """
    used = set(formats)
    return [e for e in evidence if not e.passed and linear_format(e.format).name in used]


def check_evidence(name: str, evidence: Sequence[FormatEvidence], formats: Iterable[str]) -> None:
    """Refuse a recipe that takes layers to a format which its own evidence is against.

    Args:
        name: of the recipe.
        evidence: the recipe's.
        formats: all that its stages come to on the model.

    Raises:
        ValueError: naming the first such format, and how to do it all the same.
    """
    for each in against_evidence(evidence, formats)[:1]:
        raise ValueError(
            f"recipe {name!r} uses {each.format}, which has not passed: {each.sentence()}; take"
            f" another format, or {_AT_ALL_COSTS}"
        )


def what_evidence_cannot_say(formats: Iterable[str]) -> list[str]:
    """What no short run can know of these formats, in a sentence each."""
    delayed = [name for name in sorted(set(formats)) if _is_delayed(name)]
    if not delayed:
        return []
    billions = DELAYED_TOKEN_LIMIT / 1e9
    return [
        f"{', '.join(delayed)}: delayed scaling is known to fail late, after about {billions:.0f}"
        " billion tokens (arXiv 2409.12517); no short run can certify it for a longer one"
    ]


def _is_delayed(name: str) -> bool:
    try:
        return linear_format(name).scaling == "delayed"
    except ValueError:  # a library's own, which only the plugin knows
        return False
