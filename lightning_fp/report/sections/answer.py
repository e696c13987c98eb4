"""What somebody wants to know who has to decide: was it safe, what did it cost, and what next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_fp.counting import counted
from lightning_fp.events import WatchFailed
from lightning_fp.records import Verdict
from lightning_fp.report.draw.parts import share
from lightning_fp.report.read.format_history import ever_low, format_changes, is_low
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.stability import DivergenceDetector

Tone: TypeAlias = Literal["good", "changed", "bad", "open"]
"""Green, amber, red, grey: colours that mean nothing else on the page."""

_SAFER = ("demote", "limit", "unproven")
_NAMED = 6
"""Layers that the setting names one by one at most."""
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
        return Answer(tone="open", word="A run in high precision")
    safer = safer_formats(records)
    moved = {
        layer for e in format_changes(records.events) if e.kind in _SAFER for layer in e.layers
    }
    if moved:
        convicted = any(isinstance(e, Verdict) and e.verdict == "precision" for e in records.events)
        saved = "Saved" if convicted else "Safe after a change"
        word = f"{saved}: {counted(len(moved), 'layer')} needed a safer format"
        setting = setting_for(records, safer)
        many = f"Give the {counted(len(safer), 'layer')} under {what} the format they ended in."
        return Answer(
            tone="changed",
            word=word,
            cost=cost,
            setting=setting,
            advice=many if safer and not setting else "",
        )
    if not any(event.kind == "started" for event in records.events):
        word = f"{what} trained; nobody watched for harm"
        return Answer(tone="open", word=word, cost=cost, advice=_add_a_watch(records))
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
    word = "Safe" if records.finished is not None else "Safe so far"
    return Answer(tone="good", word=word, cost=cost, setting=setting_for(records, {}))


def cost_in_loss(records: RunRecords) -> str:
    """The final loss against the baseline's at the same steps, in words; empty if not known."""
    gap = loss_gap(records)
    if gap is None or records.baseline is None:
        return ""
    name = baseline_name(records.baseline)
    if abs(gap) < _LEAST_COST:
        return f"It costs no loss: it ends where the {name} does."
    if gap < 0:
        return f"It costs no loss: it ends {share(-gap)} below the {name}."
    return f"It costs {share(gap)} of loss against the {name}."


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


def safer_formats(records: RunRecords) -> dict[str, str]:
    """Layers that ended in a safer format than they were configured in, and that format."""
    safer: dict[str, str] = {}
    for event in format_changes(records.events):
        for layer, (_, after) in event.formats.items():
            if event.kind in _SAFER:
                safer[layer] = after
            elif event.kind == "promote":
                safer.pop(layer, None)
    order = [layer.name for layer in records.layers]
    return dict(sorted(safer.items(), key=lambda item: _place(order, item[0])))


def setting_for(records: RunRecords, safer: Mapping[str, str]) -> str:
    """The plugin to write next time; empty where one line cannot say it.

    Args:
        records: the run's.
        safer: formats of single layers that it should have.
    """
    name, options = next(
        ((name, o) for name, o in records.settings.items() if "scaling" in o), ("", {})
    )
    if not name or len(safer) > _NAMED:
        return ""
    scaling = str(options["scaling"]).removeprefix("fp8-")
    own = options.get("layers") or {}
    layers = {**safer, **(dict(own) if isinstance(own, Mapping) else {})}
    rules = ", ".join(f'"{layer}": "{format}"' for layer, format in layers.items())
    return f'{name}("{scaling}"{f", layers={{{rules}}}" if rules else ""})'


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


def _place(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


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


def _why_never(records: RunRecords) -> str:
    if any(name.startswith("StagedRollout") for name in records.settings):
        return "The rollout never left its first stages: train for longer, or see its gates below."
    return (
        "Formats over time, below, has what each layer was in, and the events say who changed it."
    )


def _add_a_watch(records: RunRecords) -> str:
    watched = any(name.startswith("PrecisionFallback") for name in records.settings)
    return "" if watched else "Add PrecisionFallback() to the callbacks to have it watched."
