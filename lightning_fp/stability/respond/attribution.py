"""Attribution: which layers' formats cause the error of a gradient, and how safe they must be.

Statistics of casts name the layer that loses most, not the one whose errors matter. So groups of
layers are tried: the group alone in low precision, all others in high. The other way round, one
group in high precision, shows nothing where two are at fault: the error of the other one stays. By
halves, a culprit among 1,000 layers takes some 20 replays of one batch. Layers that do harm only
together are found by neither: then all fall back.

One batch does not stand for all: a fault may need the values of another. So the search goes from
the worst batch to the next, as long as the culprits so far leave an error that is not usual.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.stability.replay.one_step import Comparison, Replay, compare
from lightning_fp.stability.replay.parity import Run, cast_errors
from lightning_fp.stability.respond.ladder import rungs_above

log = logging.getLogger(__name__)

SHARE = 0.2
"""Share of the squared error from which on a group of layers is looked into."""

CURED = 0.25
"""Share of the squared error that may be left when the culprits are in high precision; where more
is left, they are not all."""

AS_GOOD = 2.0
"""A rung is safe enough if its squared error is at most so many times that of high precision."""

RESERVE = 8
"""Replays of the budget that the search leaves over, to check what it found and to find a rung."""

STILL = 2.0
"""Times the healthy error that a cure may leave."""

ENOUGH = 1.25
"""Times the healthy error that may be left without more culprits being looked for. Bounds that grow
with the error leave culprits over: with two of four equal ones aside, 0.2986 of it were left."""

HEALTHY_ERROR = 0.15
"""`gradient_error` below which there is nothing to attribute. Measured on a tiny GPT: casts to e4m3
and e5m2 make 5% to 8% with 2 blocks and 6% to 12% with 8, in the worst layer."""


def gradient_error(gap: Comparison) -> float:
    """The largest relative error of gradients: of all together, or of one layer's own.

    Optimizers such as Adam scale every parameter's step by itself: a layer whose gradients are
    small learns as little from wrong ones as any other, and shows in no norm over all layers. One
    whose gradients were clamped away (its own error 95%) made 13% of a tiny GPT's.

    Args:
        gap: the current formats against high precision.

    Returns:
        inf if loss or gradients are not finite.
    """
    if not (math.isfinite(gap.losses[0]) and math.isfinite(gap.all.error)):
        return math.inf
    # Layers without a gradient in high precision have no relative error.
    own = [layer.error for layer in gap.layers.values() if math.isfinite(layer.error)]
    return max(gap.all.error, *own, 0.0)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Who is to blame for one batch's gradient error."""

    error: float
    """`gradient_error` of the current formats; inf where they give inf or NaN."""

    culprits: Mapping[str, float]
    """By layer, worst first: the same error with this layer alone in low precision. Empty where
    no few layers explain the error."""

    rest: float
    """The error that is left with the culprits in high precision."""

    formats: Mapping[str, LinearFormat]
    """The least safe formats in which the culprits no longer matter."""

    cast_errors: Mapping[str, float]
    """By layer, its casts' and its product's largest relative error: what statistics say."""

    replays: int
    """How many times the batch was run."""


class Attributor:
    """Runs batches in many patterns of formats.

    A group of layers is tried alone in low precision, all others in high; groups that make much of
    the error are halved. One culprit among n layers takes 2 log2 n replays. What raises, or does
    not fit into memory, is no candidate.

    Args:
        runs: by batch, replays it alike on all ranks.
        model: what it calls.
        table: the current formats.
        high: the high precision of this run.
        budget: most replays.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        model: nn.Module,
        table: PrecisionMap,
        high: LinearFormat,
        *,
        budget: int = 48,
    ) -> None:
        self._runs, self._model, self._table, self._high = runs, model, table, high
        self._run = runs[0]
        self._low = [n for n, layer in table.layers.items() if not layer.format.is_high_precision]
        self._left = budget
        self._budget = budget
        self._reference: Replay | None = None

    def attribute(self, healthy: float = HEALTHY_ERROR) -> Attribution | None:
        """Find the culprits, and the lowest rung on which they do no harm.

        Args:
            healthy: the error that these formats make in a healthy run.

        Returns:
            None if no batch can be run, or all give inf or NaN in high precision too.
        """
        worst: list[tuple[float, int]] = []
        casts: Mapping[str, float] = {}
        for index, run in enumerate(self._runs):
            found = self._look(run)
            if found is None:
                continue
            if not worst or found[0] > max(worst)[0]:
                casts = found[1]
            worst.append((found[0], index))
        if not worst:
            return None
        worst.sort(reverse=True)
        error = worst[0][0]
        culprits: dict[str, float] = {}
        rest = 0.0
        for apart, index in worst:
            if apart <= healthy or not self._refer(self._runs[index]):
                continue
            rest = max(rest, self._add_culprits(culprits, apart, healthy))
        rest = rest if culprits else error
        # An error of more than 1, inf above all, is not the better for coming down to 1.
        if rest**2 > max(CURED * min(error, 1.0) ** 2, AS_GOOD * healthy**2):
            culprits = {}
        culprits = dict(sorted(culprits.items(), key=lambda item: -item[1]))
        if culprits:
            self._refer(self._runs[worst[0][1]])
        formats = self._rungs(list(culprits), max(rest, healthy)) if culprits else {}
        return Attribution(
            error=error,
            culprits=culprits,
            rest=rest,
            formats=formats,
            cast_errors=casts,
            replays=self._budget - self._left,
        )

    def _look(self, run: Run) -> tuple[float, Mapping[str, float]] | None:
        """A batch's error and the largest of its casts'; None if the batch says nothing."""
        if not self._refer(run):
            return None
        current = self._replay({}, observe=True)
        return None if current is None else (self._error_of(current), cast_errors(current))

    def _refer(self, run: Run) -> bool:
        """Compare with this batch from now on; False if it gives nothing finite to compare with."""
        if run is self._run and self._reference is not None:
            return True
        self._run, self._reference = run, None
        reference = self._replay(dict.fromkeys(self._low, self._high))
        if reference is None:
            return False
        self._reference = reference
        return math.isfinite(self._error_of(reference))

    def _add_culprits(self, culprits: dict[str, float], error: float, healthy: float) -> float:
        """Add those of this batch; the error that is left."""
        rest, before = error, set(culprits)
        if culprits:
            left = self._without(culprits)
            rest = error if left is None else left
        while rest > (ENOUGH * healthy if culprits else healthy):
            # with the worst aside the next stand out
            found = self._search([name for name in self._low if name not in culprits], rest)
            if culprits:  # what a healthy layer makes is much of what is left by now
                found = {name: alone for name, alone in found.items() if alone > healthy}
            left = self._without((*culprits, *found)) if found else None
            if left is None:
                break
            culprits.update(found)
            rest = left
        new = sorted((alone, name) for name, alone in culprits.items() if name not in before)
        for _, name in new if len(new) > 1 else ():  # some may have stood in for others
            if self._left <= RESERVE:
                break
            without = self._without(other for other in culprits if other != name)
            if without is not None and without <= max(rest, healthy):
                del culprits[name]
        return rest

    def _search(self, group: Sequence[str], error: float) -> dict[str, float]:
        """The layers in a group that make much of the error by themselves."""
        if len(group) == 1:
            alone = self._alone(group)
            return {group[0]: alone} if _much(alone, error) else {}
        found: dict[str, float] = {}
        middle = len(group) // 2
        for half in (group[:middle], group[middle:]):
            # A layer by itself is looked at in the next call, and need not be here as well.
            if len(half) == 1 or _much(self._alone(half), error):
                found.update(self._search(half, error))
        return found

    def _alone(self, group: Sequence[str]) -> float:
        """The error with a group in its formats and all others in high precision."""
        if self._left <= RESERVE:
            return 0.0
        error = self._without([name for name in self._low if name not in set(group)])
        return 0.0 if error is None else error

    def _without(self, layers: Iterable[str]) -> float | None:
        """The error with these layers in high precision."""
        return self._error(dict.fromkeys(layers, self._high))

    def _rungs(self, culprits: Sequence[str], least: float) -> dict[str, LinearFormat]:
        """For each the first rung at which the error is about as small as in high precision."""
        formats = dict.fromkeys(culprits, self._high)
        for name in culprits:
            layer = self._table.layers[name]
            for rung in rungs_above(layer.format, self._high, self._table, layer)[:-1]:
                error = self._error({**dict.fromkeys(culprits, self._high), name: rung})
                if error is not None and error**2 <= AS_GOOD * least**2:
                    formats[name] = rung
                    break
        return formats

    def _error(self, formats: Mapping[str, LinearFormat]) -> float | None:
        replay = self._replay(formats)
        return None if replay is None else self._error_of(replay)

    def _error_of(self, replay: Replay) -> float:
        if self._reference is None:
            raise RuntimeError("the reference comes first")
        return gradient_error(compare(replay, self._reference, self._model, self._table))

    def _replay(
        self, formats: Mapping[str, LinearFormat], *, observe: bool = False
    ) -> Replay | None:
        """None if it could not be done, or the budget is spent; alike on all ranks."""
        if self._left <= 0:
            return None
        self._left -= 1
        try:
            replay = self._run(formats, observe=observe)
        except Exception as error:  # whatever a kernel may raise that cannot multiply this
            log.warning("a candidate of the attribution cannot run: %s", error)
            return None
        return replay if replay.outcome == "done" else None


def _much(part: float, error: float) -> bool:
    if not math.isfinite(error):
        return not math.isfinite(part)
    return part**2 >= SHARE * error**2
