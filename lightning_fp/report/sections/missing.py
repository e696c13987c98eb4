"""Why there is no record: nobody asked, there was nothing to measure, or it cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fp.records.tables import DIRECTORY
from lightning_fp.report.draw.parts import Section, not_recorded
from lightning_fp.report.read.format_history import ever_low
from lightning_fp.report.read.run_records import RunRecords

NOTHING_LOW = "No layer was in low precision, so there is nothing to tell."


def lacking(sections: Sequence[Section]) -> list[tuple[list[str], str]]:
    """Titles of the sections without records, and why, together where the reason is the same.

    Args:
        sections: of a report.
    """
    found: dict[str, list[str]] = {}
    for section in sections:
        if section.missing:
            found.setdefault(section.missing, []).append(section.title)
    return [(titles, why) for why, titles in found.items()]


def took_part(records: RunRecords, callback: str) -> bool:
    """Whether a callback of that class was in the Trainer, as far as the run's settings tell."""
    return any(name.partition(" ")[0] == callback for name in records.settings)


def why_missing(
    records: RunRecords, callback: str, *, file: str, otherwise: str, options: str = ""
) -> str:
    """Why there are no records of a callback, and what to do.

    Args:
        records: the run's.
        callback: the class that makes them.
        file: what it writes, in the run's directory.
        otherwise: the reason if it was there, and what it wrote can be read.
        options: those it should be given.
    """
    if any(sentence.startswith(file) for sentence in records.unreadable):
        return f"{file} is there and cannot be read: see above."
    if took_part(records, callback):
        return otherwise
    if always_high(records):
        return NOTHING_LOW
    return not_recorded(f"add {callback}({options}) to the Trainer's callbacks")


def always_high(records: RunRecords) -> bool:
    """Whether it is known that no layer was in low precision in any step."""
    return bool(records.layers) and not ever_low(records)


def why_no_events(records: RunRecords) -> str:
    """Why nothing is told of what happened."""
    if always_high(records):
        return NOTHING_LOW
    return not_recorded("add PrecisionFallback() to the Trainer's callbacks")


def why_no_stages(records: RunRecords) -> str:
    """Why there are no stages of a rollout."""
    if always_high(records):
        return NOTHING_LOW
    return not_recorded("train with StagedRollout(recipe)")


def why_no_mismatch(records: RunRecords) -> str:
    """Why the mismatch of training and rollout was not measured."""
    return not_recorded(
        "add MismatchMonitor() to the Trainer's callbacks; only in reinforcement learning"
    )


def why_no_statistics(records: RunRecords, options: str = "") -> str:
    """Why a run has no rows of statistics."""
    return why_missing(
        records,
        "ClampMonitor",
        file=f"{DIRECTORY}/",
        options=options,
        otherwise=(
            _none_yet(records, "ClampMonitor has no rows yet", "once per log interval")
            if ever_low(records)
            else "ClampMonitor had nothing to measure: no layer was in low precision in any step."
        ),
    )


def why_no_loss(records: RunRecords) -> str:
    """Why a run has no loss curve."""
    return why_missing(
        records,
        "ClampMonitor",
        file="loss.csv",
        otherwise=_none_yet(records, "ClampMonitor has no losses yet", "once per log interval"),
    )


def why_no_probes(records: RunRecords) -> str:
    """Why ParityProbe has measured nothing."""
    none = _none_yet(records, "ParityProbe has not probed yet", "once per every_n_steps")
    return why_missing(records, "ParityProbe", file="parity.jsonl", otherwise=none)


def why_no_gap(records: RunRecords) -> str:
    """Why EvaluationGap has measured nothing."""
    none = "EvaluationGap has measured no validation in this run."
    return why_missing(records, "EvaluationGap", file="eval_gap.csv", otherwise=none)


def _none_yet(records: RunRecords, what: str, when: str) -> str:
    return f"{what}: it writes {when}, and the run is recorded up to step {records.last_step:,}."
