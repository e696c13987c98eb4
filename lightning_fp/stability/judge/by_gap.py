"""What the last batches say, forward, on the weights of now."""

from __future__ import annotations

import math
from statistics import fmean

from lightning_fp.stability.judge.evidence import Evidence
from lightning_fp.stability.questions import CompareLosses, LossesCompared
from lightning_fp.stability.replay.budget import FORWARD
from lightning_fp.stability.replay.gap import BATCHES, Gap, measure_gap
from lightning_fp.stability.respond.verdict import LARGE, SAME, Anomaly, Finding, Judgement


def by_gap(evidence: Evidence) -> Judgement | None:
    """The batches forward: it is its own control, and sees what a trajectory does not yet.

    Damaged weights make every format's errors larger, whatever has damaged them. So where the loss
    stands above its level, the gap must be a good part of that. And of a loss that is still falling
    to nothing any gap is a large share: before its noise is known nobody is convicted.
    """
    case, count = evidence.case, BATCHES if evidence.case.batch is None else 1
    while True:
        seen = evidence.answer(CompareLosses(at=case.step, count=count, batch=case.batch))
        gap = gap_of(seen, case.anomaly)
        more = gap.wants if case.batch is None and gap.count == count else None
        if more is None or not _affords(evidence, more):
            break
        count = more
    if gap.count == 0:
        return None
    explained, known = explains(seen, case.anomaly), case.anomaly.level is not None
    finding: Finding = "precision" if gap.convicts and explained and known else "unclear"
    reason = gap.sentence if explained else f"{gap.sentence}, which explains little of the rise"
    return Judgement(finding=finding, reason=reason, numbers=gap.numbers)


def _affords(evidence: Evidence, count: int) -> bool:
    """Whether more batches may be looked at."""
    question = CompareLosses(at=evidence.case.step, count=count)
    return evidence.affords(question, 2 * FORWARD * count)


def explains(seen: LossesCompared, anomaly: Anomaly) -> bool:
    """Whether the gap is a good part of what the loss stands above its level, if it does."""
    pairs = zip(seen.losses, seen.high_losses, strict=True)
    finite = [(low, high) for low, high in pairs if math.isfinite(high)]
    if anomaly.level is None or not finite or not all(math.isfinite(low) for low, _ in finite):
        return True
    baseline, noise = anomaly.level
    low, high = fmean(low for low, _ in finite), fmean(high for _, high in finite)
    rise = low - baseline
    return rise <= LARGE * noise or low - high > SAME * rise


def gap_of(seen: LossesCompared, anomaly: Anomaly) -> Gap:
    """What the batches say, beside what is a small loss in this run."""
    return measure_gap(seen.losses, seen.high_losses, least=anomaly.least)
