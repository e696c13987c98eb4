"""What somebody wants to know who has to decide: was it safe, what did it cost, and what next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_fp.counting import counted
from lightning_fp.events import WatchFailed
from lightning_fp.records import FormatChange
from lightning_fp.report.read.format_history import (
    ever_low,
    format_changes,
    is_low,
    last_formats,
    repeats_stage,
)
from lightning_fp.report.read.incidents import incidents
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.advice import limits_of
from lightning_fp.report.sections.setting import (
    LATE,
    ended_safer,
    ever_made_safer,
    made_safer_by_watch,
    pulled_back,
    setting_for,
)
from lightning_fp.stability import DivergenceDetector
from lightning_fp.statistic_names import share

Tone: TypeAlias = Literal["good", "changed", "bad", "open"]
"""Green, amber, red, grey: colours that mean nothing else on the page."""

_LEAST_COST = 5e-4
"""Differences of the loss below this share are called none."""
_MUCH = 0.01
"""From this share on a run is not called safe; what benchmarks/rescue.py calls saved is below."""

_DRIFT = 2.0
"""Times its beginning from where on a mismatch of training and rollout is said to have grown."""
_ENDS = 8
"""Measured steps that its beginning and its end are a median of."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The top line of a report."""

    tone: Tone

    word: str
    """In a few words."""

    cost: str = ""
    """What it cost in loss, as a sentence; empty if that is not known."""

    setting: str = ""
    """The setting to take next time, as code; empty if there is none to recommend."""

    advice: str = ""
    """The same in words, where no line of code says it."""


def answer(records: RunRecords) -> Answer:
    """The answer that a run's records give.

    Args:
        records: the run's.
    """
    if not records.last_step:
        return Answer(tone="open", word="Nothing is recorded yet")
    asked = [layer for layer in records.layers if layer.reason is None]
    what = name_of_low(records)
    if asked and not ever_low(records):
        return Answer(tone="bad", word=f"{what} was never on", advice=_why_never(records))
    cost = cost_in_loss(records)
    if _lost(records):
        return Answer(tone="bad", word="The loss is not finite", advice=_add_a_watch(records))
    failed = [event.step for event in records.events if isinstance(event, WatchFailed)]
    if failed:
        word = f"Unprotected from step {failed[0]:,}"
        advice = "What happened, below, says what failed."
        return Answer(tone="bad", word=word, cost=cost, advice=advice)
    if not ever_low(records):
        return Answer(tone="open", word="A run in high precision", advice=_as_baseline(records))
    safer = ended_safer(records)
    if ever_made_safer(records):
        convicted = any(each.finding == "precision" for each in incidents(records.events))
        word = f"{'Saved' if convicted else 'Safe after a change'}: {_made_safer(records)}"
        setting = setting_for(records, safer)
        many = f"Give the {counted(len(safer), 'layer')} under {what} the format they ended in."
        return Answer(
            tone="changed",
            word=word,
            cost=cost,
            setting=setting,
            advice=many if safer and not setting else _of_delayed(setting),
        )
    if not any(event.kind == "started" for event in records.events):
        over = _over_a_limit(records)
        losses = f"{counted(len(over), 'layer')} lost more in casts than the limits allow"
        word = (
            f"Nobody watched, and {losses}" if over else f"{what} trained; nobody watched for harm"
        )
        where = "See Worst operands over time, below. " if over else ""
        tone: Tone = "changed" if over else "open"
        return Answer(tone=tone, word=word, cost=cost, advice=f"{where}{_add_a_watch(records)}")
    if taken := _taken_back(records):
        word = f"{what} was taken back at step {taken.step:,}, and not turned on again"
        why = f"{taken.reason[:1].upper()}{taken.reason[1:]}." if taken.reason else ""
        return Answer(tone="changed", word=word, cost=cost, advice=why)
    if records.last_step < (least := _armed(records)):
        word = f"Too short to judge: the watch learns for {counted(least, 'step')}"
        return Answer(tone="open", word=word, cost=cost)
    if _apart(records) > _DRIFT:
        word = "Nothing broke, and training and rollout drift apart"
        advice = "`lightning-fp mismatch RUN` says where that comes from, and what to do."
        return Answer(tone="changed", word=word, cost=cost, advice=advice)
    if (loss_gap(records) or 0) > _MUCH:
        word = "Nothing broke, but the loss is higher"
        advice = "What to change, below, names the layers that lose most."
        return Answer(tone="changed", word=word, cost=cost, advice=advice)
    others = [
        incident
        for incident in incidents(records.events)
        if incident.finding == "not precision" and not incident.provisional
    ]
    over = counted(records.last_step, "step")
    if others:
        word = f"No harm from {what} over {over}; something else went wrong at step"
        likeness = others[-1].likeness
        return Answer(
            tone="changed",
            word=f"{word} {others[-1].step:,}",
            cost=cost,
            setting=setting_for(records, {}),
            advice=f"{likeness[0].upper()}{likeness[1:]}." if likeness else "",
        )
    if records.finished is None:
        word = f"Safe so far, over {over}"
        advice = "Its end is not recorded, so there is nothing to recommend yet."
        return Answer(tone="good", word=word, cost=cost, advice=advice)
    word, setting = f"Safe over {over}", setting_for(records, {})
    return Answer(tone="good", word=word, cost=cost, setting=setting, advice=_of_delayed(setting))


def cost_in_loss(records: RunRecords) -> str:
    """The final loss against the baseline's at the same steps, in words; empty if not known."""
    gap = loss_gap(records)
    if records.baseline is None:
        return "What it costs in loss is not known: the report has no baseline to compare with."
    if gap is None:
        return ""
    name = baseline_name(records.baseline)
    if abs(gap) < _LEAST_COST:
        return f"It costs no loss: it ends where the {name} does."
    if gap < 0:
        return f"It costs no loss: the final loss is {share(-gap)} lower than the {name}'s."
    return f"The final loss is {share(gap)} higher than the {name}'s."


def baseline_name(records: RunRecords) -> str:
    """What a run is called that another is compared with."""
    return "baseline" if "baseline" in records.name else f"baseline {records.name}"


def loss_gap(records: RunRecords) -> float | None:
    """How much higher the run's final loss is than the baseline's over the same steps, as a share.

    None where there is no baseline, or it does not reach as far.
    """
    own, other = records.steps, None if records.baseline is None else records.baseline.steps
    if own is None or other is None or other.last < own.last:
        return None
    final, same = own.final_loss(), other.up_to(own.last).final_loss()
    return None if final is None or not same else (final - same) / abs(same)


def name_of_low(records: RunRecords) -> str:
    """What the low precision of a run is called."""
    asked = [layer.format for layer in records.layers if layer.reason is None]
    asked += [str(o["scaling"]) for o in records.settings.values() if "scaling" in o]
    if any(format.startswith(("fp8", "mxfp8")) for format in asked):
        return "FP8"
    if any(name.startswith("FP16") for name in records.settings):
        return "FP16"
    low = sorted({format for format in asked if is_low(format)})
    return low[0] if len(low) == 1 else "FP8" if not low else "Low precision"


def _armed(records: RunRecords) -> int:
    """Steps that the run's watch learns for, before it judges."""
    detector = records.settings.get("PrecisionFallback", {}).get("detector")
    armed = detector.get("armed") if isinstance(detector, Mapping) else None
    return int(armed) if isinstance(armed, int) else DivergenceDetector().armed


def _apart(records: RunRecords) -> float:
    """How many times its beginning the mismatch of training and rollout is at the end."""
    values = records.mismatch.get("logprob_abs_diff_mean")
    known = None if values is None else values[values.isfinite()]
    if known is None or len(known) < 2 * _ENDS:
        return 1.0
    first = known[:_ENDS].median().item()
    return known[-_ENDS:].median().item() / first if first > 0 else 1.0


def _lost(records: RunRecords) -> bool:
    """Whether the run ended in inf or NaN."""
    steps = records.steps
    return steps is not None and not steps.losses[-max(1, min(8, len(steps))) :].isfinite().any()


def _of_delayed(setting: str) -> str:
    """What has to be known of a setting with delayed scaling."""
    return LATE if "delayed" in setting else ""


def _as_baseline(records: RunRecords) -> str:
    """Why no layer was in low precision, and what the run is good for."""
    reasons = {layer.reason for layer in records.layers}
    why = f"Every layer was left in it ({reasons.pop()}). " if len(reasons) == 1 else ""
    return f"{why}It can serve as a baseline: `lightning-fp report OTHER --baseline RUN`."


def _why_never(records: RunRecords) -> str:
    if any(name.startswith("StagedRollout") for name in records.settings):
        return "The rollout never left its first stages: train for longer, or see its gates below."
    return (
        "Formats over time, below, has what each layer was in, and the events say who changed it."
    )


def _made_safer(records: RunRecords) -> str:
    """How many layers the watch moved to a safer format, and how many the rollout took back."""
    watch = made_safer_by_watch(records)
    rollout = pulled_back(records).keys() - watch
    layers = counted(len(records.layers), "layer")
    needed = f"{len(watch)} of {layers} needed a safer format"
    back = f"{len(rollout)} went back with {'its' if len(rollout) == 1 else 'their'} stage"
    if not rollout:
        return needed
    return f"{needed}, {back}" if watch else f"the rollout took {len(rollout)} of {layers} back"


def _taken_back(records: RunRecords) -> FormatChange | None:
    """What took the last layer out of low precision, where none was in it at the end.

    Not a stage of a rollout, which ends in high precision because somebody planned so.
    """
    if any(map(is_low, last_formats(records).values())):
        return None
    changes = [
        event
        for event in format_changes(records.events)
        if not repeats_stage(event)
        and any(is_low(before) and not is_low(after) for before, after in event.formats.values())
    ]
    return changes[-1] if changes else None


def _over_a_limit(records: RunRecords) -> set[str]:
    """Layers whose casts were worse than the limits allow at some time."""
    if records.statistics is None:
        return set()
    limits = limits_of(records.settings)
    return {
        of.layer
        for of in records.statistics.totals
        for ranking, limit in limits.items()
        if (value := of.worst[ranking]) is not None
        and (value < limit if ranking == "sqnr_db" else value > limit)
    }


def _add_a_watch(records: RunRecords) -> str:
    watched = any(name.startswith("PrecisionFallback") for name in records.settings)
    return "" if watched else "Add PrecisionFallback() to the callbacks to have it watched."
