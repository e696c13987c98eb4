"""The watch as a machine: what it decides, whatever happens in whatever order, and its state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp.events import (
    Demotion,
    Event,
    LayerClimb,
    Note,
    Promotion,
    Rollback,
    UnprovenClimb,
    Verdict,
)
from lightning_fp.layers import linear_format
from lightning_fp.stability.actions import Action, DropRecords, GoBack, TakeSnapshot, Write
from lightning_fp.stability.detect.signals import StepSignals
from lightning_fp.stability.happenings import (
    AmaxSeen,
    Answered,
    Asked,
    Attempted,
    Boundary,
    Ended,
    FormatsChanged,
    Happening,
    Looked,
    Settled,
    StepSeen,
)
from lightning_fp.stability.questions import (
    Answer,
    Attribute,
    Attributed,
    CheckCure,
    Climb,
    Climbed,
    CompareLosses,
    CureChecked,
    Failed,
    HighReplayed,
    LossesCompared,
    Probed,
    ProbeStep,
    Promote,
    Promoted,
    Question,
    ReplayHigh,
    ReplayStep,
    ReplayStretch,
    StepReplayed,
    StretchReplayed,
    Survey,
    Surveyed,
)
from lightning_fp.stability.replay.budget import INCIDENT, RESERVE, ReplayBudget
from lightning_fp.stability.respond.attribution import HEALTHY_ERROR, Attribution
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from lightning_fp.stability.respond.limits import Excess, LayerLimit
from lightning_fp.stability.respond.probe import Probe
from lightning_fp.stability.respond.verdict import OneStep
from lightning_fp.stability.watch import Watch
from lightning_fp.stability.watch_state import WatchState

HIGH, FP8 = linear_format("bf16"), "fp8-dynamic"
LOW = {"blocks.0.fc": FP8, "blocks.0.proj": FP8, "head": FP8}
CULPRIT = Attribution(
    error=0.9,
    culprits={"blocks.0.fc": 0.88},
    rest=0.1,
    formats={"blocks.0.fc": HIGH},
    cast_errors={},
    replays=7,
)
STEPS = 32


class Loop:
    """A loop that only answers: `harm` is what the recorded loss is above high precision's.

    Of that, replays in the run's own formats show the shares `eager` and `compiled`, and one that
    is compiled in high precision the share `compiled_high`. A placebo moves the loss by `chaos`.
    """

    def __init__(self, **options: Any) -> None:
        self.harm: float = options.pop("harm", 0.0)
        self.finite: bool = options.pop("finite", True)
        self.low: dict[str, str] = options.pop("low", LOW)
        self.fails: bool = options.pop("fails", False)
        self.error: float = options.pop("error", 0.05)
        self.gap: float = options.pop("gap", 0.0)
        self.risen: float = options.pop("risen", 0.0)
        self.cured: bool = options.pop("cured", True)
        self.eager: float = options.pop("eager", 1.0)
        self.compiled: float | None = options.pop("compiled", None)
        self.compiled_high: float = options.pop("compiled_high", 0.0)
        self.chaos: float = options.pop("chaos", 0.0)
        self.replayable: bool = options.pop("replayable", True)
        self.probe_gap: float = options.pop("probe_gap", 0.0)
        self.length: int = options.pop("length", STEPS)
        self.found: Callable[[int | None], Attribution] = lambda _: CULPRIT
        self.survey = Surveyed(high=HIGH)
        self.stored: int = options.pop("stored", 0)
        self.asked: list[Question[Any]] = []
        self.done: list[Action] = []

    def answer(self, question: Question[Any]) -> Answer:
        self.asked.append(question)
        if self.fails:
            return Failed(error="no memory")
        match question:
            case Survey(at=at, risen=risen, most=most):
                start = max(0, at - (STEPS if risen else min(most, self.length)))
                losses = tuple(3.0 + self.harm for _ in range(start, at))
                self.survey = Surveyed(
                    low=self.low,
                    high=HIGH,
                    start=start,
                    losses=losses,
                    steps=tuple(range(start, at)),
                    finite=self.finite,
                    compiled=self.compiled is not None,
                    stored=self.stored,
                    replayable=self.replayable,
                )
                return self.survey
            case ReplayStep():
                same = OneStep(
                    loss=3.0,
                    high_loss=3.0,
                    grad_norm_ratio=1.0,
                    finite=True,
                    high_finite=True,
                    grad_error=self.error,
                    worst_error=self.error,
                    floor=0.0,
                )
                return StepReplayed(seen=same, replays=3)
            case CompareLosses(count=count):
                level = 3.0 + self.risen
                losses = tuple(level + self.gap + 0.001 * (i % 3) for i in range(count))
                high = tuple(level - 0.001 * (i % 2) for i in range(count))
                return LossesCompared(losses=losses, high_losses=high, replays=6)
            case ReplayStretch(precision=precision, compiled=compiled, steps=steps):
                own = (self.compiled or 0.0) if compiled else self.eager
                high = self.compiled_high if compiled else 0.0
                shares = {"own": own, "placebo": own, "high": high}
                loss = 3.0 + self.harm * shares[precision]
                loss -= self.chaos if precision == "placebo" else 0.0
                length = len(self.survey.losses or ()) if steps is None else steps
                losses = (loss,) * length
                return StretchReplayed(done=True, losses=losses, made=length, replays=length)
            case ReplayHigh():
                return HighReplayed(loss=3.0, finite=True, loss_then=3.0, replays=1)
            case Attribute(weights=weights):
                return Attributed(found=self.found(weights), replays=7)
            case ProbeStep():
                losses = (3.0 + self.probe_gap, 3.0)
                return Probed(error=self.error, losses=losses, replays=2)
            case Climb():
                rungs = ["fp8-rowwise", "fp8-rowwise-gw-hp", "bf16", None]
                before = [q for q in self.asked if isinstance(q, Climb)]
                return Climbed(before=FP8, after=rungs[min(len(before), 4) - 1])
            case CheckCure():
                losses = (3.0 if self.cured else 3.3,) * 8
                return CureChecked(losses=losses, high_losses=(3.0,) * 8, grad_error=0.05)
            case Promote(formats=formats):
                return Promoted(formats={name: ("bf16", format) for name, format in formats})
            case _:
                raise AssertionError(question)


def tell(
    watch: Watch, state: WatchState, happening: Happening, loop: Loop
) -> tuple[WatchState, list[Event]]:
    """As an adapter drives it."""
    state, actions, events = watch.step(state, happening)
    for action in actions:
        if isinstance(action, Question):
            answer = loop.answer(action)
            state, more = tell(watch, state, Answered(question=action, answer=answer), loop)
            events += more
        else:
            loop.done.append(action)
    return state, events


def machine(**options: Any) -> Watch:
    defaults: dict[str, Any] = {"probe": Probe(), "limit": LayerLimit(), "layers": len(LOW)}
    return Watch(**{**defaults, **options})


def signals(step: int, loss: float = 3.0, *, skipped: bool = False) -> StepSignals:
    wiggle = 0.02 * math.sin(step)
    return StepSignals(
        step=step, loss=loss + wiggle, grad_norm=1.0, lr=1e-3, headroom=None, skipped=skipped
    )


def run(
    watch: Watch,
    loop: Loop,
    losses: Callable[[int], float],
    steps: int,
    state: WatchState | None = None,
    start: int = 0,
) -> tuple[WatchState, list[Event]]:
    state = watch.init() if state is None else state
    events: list[Event] = []
    for step in range(start, start + steps):
        for happening in (
            Attempted(),
            StepSeen(at=step + 1, signals=signals(step, losses(step))),
            Boundary(at=step + 1),
            Settled(at=step + 1),
        ):
            state, more = tell(watch, state, happening, loop)
            events += more
    return state, events


def kinds(events: Sequence[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def rises_at(step: int, loop: Loop) -> Callable[[int], float]:
    """A rise that lasts until a layer is written to."""

    def loss(now: int) -> float:
        saved = any(isinstance(order, Write) for order in loop.done)
        return 3.5 if now >= step and not saved else 3.0

    return loss


def test_nothing_wrong_asks_for_probes_and_snapshots_only() -> None:
    loop = Loop()
    state, events = run(machine(), loop, lambda _: 3.0, 300)
    assert {type(question) for question in loop.asked} == {ProbeStep}
    assert {type(order) for order in loop.done} == {TakeSnapshot}
    assert [event.kind for event in events] == ["state"]
    assert state.fallback.phase == "healthy"
    assert state.steps.attempted == state.steps.useful == 300


def test_a_rise_that_high_precision_takes_away_convicts_and_goes_back() -> None:
    loop = Loop(harm=0.5)
    state, events = run(machine(), loop, rises_at(150, loop), 170)
    (demotion,) = kinds(events, Demotion)
    assert demotion.formats == {"blocks.0.fc": (FP8, "bf16")}
    assert demotion.step <= 156
    (rollback,) = kinds(events, Rollback)
    assert rollback.replayed == demotion.step - rollback.to_step == STEPS
    orders = [order for order in loop.done if isinstance(order, (Write, GoBack))]
    assert [type(order) for order in orders] == [Write, GoBack]
    assert state.fallback.phase == "probation"
    assert state.steps.useful == state.steps.attempted
    assert state.steps.replayed > STEPS


@pytest.mark.parametrize(
    ("shown", "verdict", "words"),
    [
        ({"eager": 0.05}, "not reproducible", "show 5% of the harm"),
        ({"eager": 0.35}, "unclear", "show 35% of the harm"),
        ({"eager": 0.8}, "precision", "show 80% of the harm"),
        ({"eager": 0.0, "compiled": 0.1}, "not reproducible", "show 10% of the harm"),
        ({"eager": 0.0, "compiled": 1.0}, "precision", "only in low precision"),
        (
            {"eager": 0.0, "compiled": 1.0, "compiled_high": 0.9},
            "compiled code",
            "in high precision too",
        ),
    ],
)
def test_a_conviction_needs_a_control_that_repeats_the_harm(
    shown: dict[str, float], verdict: str, words: str
) -> None:
    loop = Loop(harm=0.5, **shown)
    state, _ = run(machine(), loop, lambda _: 3.0, 150)
    state, events = tell(machine(), state, Asked(at=150, onset=130), loop)
    control = kinds(events, Verdict)[-1]
    assert (control.tier, control.verdict) == ("control", verdict)
    assert words in control.reason
    convicted = verdict == "precision"
    assert bool(kinds(events, Demotion)) is bool(kinds(events, Rollback)) is convicted
    dropped = any(isinstance(order, DropRecords) for order in loop.done)
    assert dropped is (verdict == "not reproducible")


@pytest.mark.parametrize("risen", [False, True])
def test_gradients_that_are_wrong_convict_before_the_loss_has_suffered(risen: bool) -> None:
    """Not where the loss has risen, and rises in high precision as well."""
    loop = Loop(error=3.0)
    state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
    _, events = tell(machine(), state, Asked(at=150, onset=130, risen=risen), loop)
    first, *_ = kinds(events, Verdict)
    assert (first.tier, first.verdict) == ("one step", "precision")
    assert bool(kinds(events, Demotion)) is not risen


@pytest.mark.parametrize(
    ("harm", "risen", "chaos", "convicted"),
    [
        (0.5, True, 0.1, True),
        (0.5, True, 0.2, False),
        (0.5, True, -0.2, False),
        (0.045, False, 0.0, True),
        (0.045, False, 0.02, False),
        (0.1, False, 0.02, True),
        (0.02, False, 0.0, False),
    ],
)
def test_a_trajectory_convicts_of_what_is_three_times_a_placebo(
    harm: float, risen: bool, chaos: float, convicted: bool
) -> None:
    """Of a loss of 3: chaos parts two runs as far as precision may seem to."""
    loop = Loop(harm=harm, chaos=chaos)
    state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
    _, events = tell(machine(), state, Asked(at=150, onset=130, risen=risen), loop)
    assert bool(kinds(events, Demotion)) is convicted
    asked = [q.precision for q in loop.asked if isinstance(q, ReplayStretch)]
    assert asked == (["high"] if harm == 0.02 else ["high", "own", "placebo"])
    if chaos and not convicted:
        assert "chance" in kinds(events, Verdict)[-1].reason


@pytest.mark.parametrize("harm", [0.0, 0.045, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_replays_keep_to_their_budget(share: float, harm: float) -> None:
    """Probes that are always suspicious had 479 to 518 steps replayed in runs of 340."""
    loop = Loop(error=0.9, harm=harm, eager=0.3, gap=0.02, length=10_000)
    watch = machine(budget=ReplayBudget(share=share))
    for steps in (340, 1000):
        state, _ = run(watch, loop, lambda _: 3.0, steps)
        assert 64 < state.steps.replayed <= share * steps + INCIDENT
    asked = [type(question) for question in loop.asked]
    assert ProbeStep in asked
    assert ReplayStretch in asked


def test_without_budget_a_rise_stays_unclear_and_says_why() -> None:
    loop, watch = Loop(harm=0.5), machine()
    state, _ = run(watch, loop, lambda _: 3.0, 150)
    spent = replace(state.steps, replayed=INCIDENT - 20)
    state = replace(state, steps=spent)
    state, events = run(watch, loop, lambda _: 3.5, 10, state, start=150)
    assert not kinds(events, Demotion)
    assert not any(isinstance(question, ReplayStretch) for question in loop.asked)
    assert "the replay budget is spent" in kinds(events, Verdict)[-1].reason


def test_without_budget_for_a_placebo_two_per_cent_are_needed() -> None:
    for harm, convicted in ((0.5, True), (0.045, False)):
        loop = Loop(harm=harm)
        state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
        room = 9 + 2 * STEPS + RESERVE + 1
        spent = replace(state.steps, replayed=INCIDENT + 7 - room)
        state = replace(state, steps=spent)
        _, events = tell(machine(), state, Asked(at=150, onset=130, risen=harm == 0.5), loop)
        asked = [q.precision for q in loop.asked if isinstance(q, ReplayStretch)]
        assert asked == ["high", "own"]
        assert bool(kinds(events, Demotion)) is convicted


@pytest.mark.parametrize("act", [False, True])
def test_where_nothing_can_be_replayed_layers_climb_only_if_asked_to(act: bool) -> None:
    watch, loop = machine(probe=None, act_without_proof=act), Loop(replayable=False)
    state, events = run(watch, loop, lambda step: 3.0 + 0.5 * (step >= 150), 160)
    assert not kinds(events, Demotion)
    assert not kinds(events, LayerClimb)
    climbs = kinds(events, UnprovenClimb)
    assert [climb.layers[0] for climb in climbs] == (list(LOW) if act else [])
    assert not any(isinstance(question, (ReplayStep, CheckCure)) for question in loop.asked)
    assert state.fallback.demotions == 0
    assert not kinds(events, Verdict)  # nothing was asked


def test_a_probe_whose_loss_is_dear_has_more_batches_compared() -> None:
    """A format that was too coarse from the first step on: its error is usual, nothing rises."""
    for dear in (False, True):
        loop, watch = Loop(error=0.1, probe_gap=0.01), machine()
        state, _ = run(watch, loop, lambda _: 3.0, 100)
        loop.probe_gap = 0.06 if dear else 0.01
        run(watch, loop, lambda _: 3.0, 40, state, start=100)
        looks = [q.at for q in loop.asked if isinstance(q, CompareLosses)]
        assert looks == ([128] if dear else [])


def test_a_format_that_was_too_coarse_from_the_start_is_undone_to_the_start() -> None:
    """Its errors raise no suspicion, and one batch may not tell: the first look takes eight."""
    loop, watch = Loop(error=0.2, probe_gap=0.0, gap=0.06, harm=0.06, length=100), machine()
    _, events = run(watch, loop, lambda _: 3.0, 100)
    (first, *_) = kinds(events, Demotion)
    assert first.step == 64
    assert next(question.onset for question in loop.asked if isinstance(question, Survey)) == 0


def test_no_layer_climbs_by_a_limit_while_the_loss_is_up() -> None:
    """A learning rate that is too high moves casts as well."""
    excess = Excess(layer="head", operand="input", statistic="underflow", value=0.3, limit=0.25)
    for risen in (True, False):
        watch, loop = machine(probe=None), Loop()
        state, _ = run(watch, loop, lambda step, up=risen: 3.0 + 0.5 * (step >= 150) * up, 156)
        for at in (156, 157, 158):
            look = Looked(at=at, names=tuple(LOW), excesses={"head": excess})
            state, _ = tell(watch, state, look, loop)
        assert any(isinstance(question, Climb) for question in loop.asked) is not risen


def test_an_acquittal_needs_no_control() -> None:
    loop = Loop(error=0.9)
    run(machine(), loop, lambda _: 3.0, 100)
    assert [q.precision for q in loop.asked if isinstance(q, ReplayStretch)] == ["high"]


def test_only_the_control_of_a_rise_may_end_early() -> None:
    for risen in (False, True):
        loop = Loop(harm=0.5)
        state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
        tell(machine(), state, Asked(at=150, onset=130, risen=risen), loop)
        high, own, placebo = (q for q in loop.asked if isinstance(q, ReplayStretch))
        assert own.until == (high if risen else None)
        assert placebo.steps == STEPS


def test_a_gap_convicts_before_a_trajectory_shows_harm() -> None:
    loop = Loop(gap=0.12)
    state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
    state, events = tell(machine(), state, Asked(at=150, onset=140, risen=False), loop)
    told = {verdict.tier: verdict.verdict for verdict in kinds(events, Verdict)}
    assert told["gap"] == "precision"
    assert told["trajectory"] == "not precision"
    assert kinds(events, Demotion)
    assert kinds(events, Rollback)  # its control repeats the record


def test_a_gap_that_is_a_small_part_of_a_rise_convicts_nobody() -> None:
    """On damaged weights every format has larger errors."""
    loop = Loop(gap=0.12, risen=2.0)
    state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
    state, events = tell(machine(), state, Asked(at=150, onset=140), loop)
    assert "gap" not in {verdict.tier for verdict in kinds(events, Verdict)}
    assert not kinds(events, Demotion)


@pytest.mark.parametrize(
    ("shown", "last"),
    [({}, "not precision"), ({"harm": 0.5, "eager": 0.05}, "not reproducible")],
    ids=["high precision rises as well", "the control does not show it"],
)
def test_a_gap_does_not_convict_of_a_rise_that_came_from_elsewhere(
    shown: dict[str, float], last: str
) -> None:
    """Another objective or single bad launches leave weights on which formats have a gap."""
    loop = Loop(gap=0.12, **shown)
    state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
    state, events = tell(machine(), state, Asked(at=150, onset=140), loop)
    verdicts = kinds(events, Verdict)
    assert "gap" in {verdict.tier for verdict in verdicts}
    assert verdicts[-1].verdict == last
    assert not kinds(events, Demotion)


def test_a_gap_convicts_nobody_before_the_noise_of_the_loss_is_known() -> None:
    _, events = tell(machine(), WatchState(), Asked(at=20, onset=10, risen=False), Loop(gap=0.5))
    assert not kinds(events, Demotion)


def test_a_gap_that_does_not_tell_looks_at_more_batches() -> None:
    loop = Loop(gap=0.029)
    tell(machine(), WatchState(), Asked(at=150, onset=140, risen=False), loop)
    counts = [q.count for q in loop.asked if isinstance(q, CompareLosses)]
    assert counts == [8]
    noisy = Loop(gap=0.029)
    noisy.answer = _noisy(noisy.answer)  # type: ignore[method-assign]
    tell(machine(), WatchState(), Asked(at=150, onset=140, risen=False), noisy)
    counts = [q.count for q in noisy.asked if isinstance(q, CompareLosses)]
    assert counts == [8, 16, 32]


def _noisy(answer: Callable[[Question[Any]], Answer]) -> Callable[[Question[Any]], Answer]:
    """Gaps of 1% and more, of either sign."""

    def noisy(question: Question[Any]) -> Answer:
        told = answer(question)
        if not isinstance(told, LossesCompared):
            return told
        losses = tuple(3.03 + 0.06 * (-1) ** i for i in range(len(told.losses)))
        return LossesCompared(losses=losses, high_losses=(3.0,) * len(losses), replays=6)

    return noisy


def test_no_harm_so_far_is_asked_again_and_stays_as_alarming() -> None:
    """A slow fault is probed before it harms: its error is not usual, nor is a rise waited out."""
    loop, watch = Loop(error=0.9), machine()
    state, events = run(watch, loop, lambda _: 3.0, 150)
    assert "does not harm the loss" in kinds(events, Note)[0].reason
    assert state.fallback.quiet_until == 0
    at = [q.at for q in loop.asked if isinstance(q, Survey)]
    looks = [q.at for q in loop.asked if isinstance(q, CompareLosses) and q.at > at[0]]
    assert len(at) <= 2  # trajectories are asked for far less often
    assert [look - at[0] for look in looks[:3]] == [4, 12, 28]
    loop.harm = 0.5
    state, events = run(watch, loop, rises_at(150, loop), 10, state, start=150)
    assert kinds(events, Demotion)[0].step <= 156


def test_a_snapshot_from_before_an_open_case_is_kept_and_a_rise_goes_back_to_it() -> None:
    loop, watch = Loop(error=0.9), machine()
    state, _ = run(watch, loop, lambda _: 3.0, 140)
    began = next(q.onset for q in loop.asked if isinstance(q, Survey))
    taken = [order for order in loop.done if isinstance(order, TakeSnapshot)]
    before = [order.keep_from for order in taken if order.at < began]
    assert set(before) == {None}
    assert all(began <= (order.keep_from or 0) <= order.at for order in taken[-10:])
    loop.asked.clear()
    looked = state.cases.calm_at
    assert looked is not None
    state, _ = run(watch, loop, rises_at(140, loop), 4, state, start=140)
    assert [q.onset for q in loop.asked if isinstance(q, Survey) and q.risen] == [looked]


def test_what_was_acquitted_and_shows_a_gap_later_is_convicted() -> None:
    loop, watch = Loop(error=0.9), machine()
    state, _ = run(watch, loop, lambda _: 3.0, 100)
    loop.gap = 0.2
    state, events = run(watch, loop, lambda _: 3.0, 60, state, start=100)
    assert kinds(events, Demotion)
    assert not state.cases.began


def test_a_batch_whose_casts_jump_is_compared_at_once() -> None:
    loop, watch = Loop(), machine(probe=Probe(every_n_steps=10_000))
    state, events = run(watch, loop, lambda _: 3.0, 100)
    loop.asked.clear()
    loop.gap = 0.2
    events = []
    for step in range(100, 140):
        amax = torch.ones(3, 2) * (1 + 0.1 * (step % 3))
        if step == 137:
            amax[1, 0] = 64.0
        state, more = tell(watch, state, AmaxSeen(at=step + 1, step=step, amax=amax), loop)
        events += more
    assert loop.asked[0] == CompareLosses(at=138, batch=137)
    assert Attribute(healthy=HEALTHY_ERROR, batches=(137,), alone=True) in loop.asked
    (demotion,) = kinds(events, Demotion)
    assert demotion.step == 138
    assert state.fallback.demotions == 0  # no incident: others of the same kind may follow
    assert state.fallback.phase == "probation"


@pytest.mark.parametrize(("cured", "climbs"), [(True, 1), (False, 3)])
def test_a_climb_that_does_not_cure_goes_on(cured: bool, climbs: int) -> None:
    watch, loop = machine(), Loop(cured=cured)
    state, _ = run(watch, loop, lambda _: 3.0, 100)
    excess = Excess(layer="head", operand="input", statistic="clamped_mass", value=0.2, limit=0.01)
    events: list[Event] = []
    for at in (100, 101, 102):
        look = Looked(at=at, names=tuple(LOW), excesses={"head": excess})
        state, more = tell(watch, state, look, loop)
        events += more
    assert len(kinds(events, LayerClimb)) == climbs
    assert kinds(events, LayerClimb)[-1].formats["head"][1] == ("fp8-rowwise" if cured else "bf16")


def test_a_cure_is_asked_about_again_and_what_grew_is_convicted() -> None:
    watch, loop = machine(), Loop()
    state, _ = run(watch, loop, lambda _: 3.0, 100)
    excess = Excess(layer="head", operand="input", statistic="clamped_mass", value=0.2, limit=0.01)
    for at in (100, 101, 102):
        look = Looked(at=at, names=tuple(LOW), excesses={"head": excess})
        state, _ = tell(watch, state, look, loop)
    state, events = run(watch, loop, lambda _: 3.0, 20, state, start=102)
    again = [question.at for question in loop.asked if isinstance(question, CompareLosses)]
    assert again == [106, 114]
    assert not kinds(events, Demotion)
    loop.gap, loop.harm = 0.1, 0.1
    _, events = run(watch, loop, lambda _: 3.0, 20, state, start=122)
    assert kinds(events, Demotion)[0].step == 130


def test_a_dry_run_orders_nothing() -> None:
    loop = Loop(harm=0.5)
    _, events = run(machine(dry_run=True), loop, rises_at(150, loop), 160)
    assert kinds(events, Demotion)
    assert not kinds(events, Rollback)
    assert {type(order) for order in loop.done} <= {TakeSnapshot}


def test_a_rise_in_high_precision_too_is_acquitted_with_a_likeness() -> None:
    loop = Loop(harm=0.0)
    state, _ = run(machine(), loop, lambda _: 3.0, 160)
    state, events = tell(machine(), state, Asked(at=160, onset=150), loop)
    assert [verdict.verdict for verdict in kinds(events, Verdict)] == ["unclear", "not precision"]
    (note,) = kinds(events, Note)
    assert "older batch" in note.reason
    assert state.fallback.quiet_until == 160 + 50


def _acquitted_rise(**options: Any) -> tuple[Watch, Loop, WatchState]:
    """Something else has raised the loss, and the grace is to last until step 210."""
    watch, loop = machine(**options), Loop()
    state, _ = run(watch, loop, lambda _: 3.0, 160)
    state, _ = tell(watch, state, Asked(at=160, onset=150), loop)
    assert state.fallback.quiet_until == 160 + 50
    loop.asked.clear()
    return watch, loop, state


def test_a_fault_that_follows_a_rise_of_another_kind_waits_for_no_grace() -> None:
    watch, loop, state = _acquitted_rise(probe=Probe(every_n_steps=10_000))
    state, events = run(watch, loop, lambda _: 3.4, 8, state, start=160)
    assert [q.at for q in loop.asked if isinstance(q, CompareLosses)] == [164]
    assert not kinds(events, Verdict)
    loop.asked.clear()
    loop.gap = loop.harm = 0.2
    state, events = run(watch, loop, lambda _: 3.4, 8, state, start=168)
    # The demotion does not help here, and so is followed by another.
    asked = [(q.at, q.onset) for q in loop.asked if isinstance(q, Survey)]
    assert asked == [(172, 164), (176, 172)]
    assert [event.step for event in kinds(events, Demotion)] == [172, 176]


def test_a_gap_that_is_a_small_part_of_what_rose_since_is_not_looked_into() -> None:
    """Weights that something else goes on to damage make the errors of every format larger."""
    watch, loop, state = _acquitted_rise(probe=Probe(every_n_steps=10_000))
    state, _ = run(watch, loop, lambda _: 3.0, 8, state, start=160)
    loop.gap, loop.risen = 0.2, 2.0
    state, events = run(watch, loop, lambda _: 5.0, 40, state, start=168)
    assert len([q for q in loop.asked if isinstance(q, CompareLosses)]) >= 2
    assert not [q for q in loop.asked if isinstance(q, Survey)]
    assert not kinds(events, Verdict)


def test_a_probe_is_heard_in_a_grace() -> None:
    watch, loop, state = _acquitted_rise()
    loop.error, loop.harm = 0.9, 0.5
    _, events = run(watch, loop, lambda _: 3.0, 50, state, start=160)
    assert kinds(events, Demotion)[0].step < 210


@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_a_rise_that_goes_on_is_replayed_ever_less_often(gap: float) -> None:
    """A learning rate that is far too high, with weights that make every format's errors larger."""
    watch, loop = machine(budget=ReplayBudget(share=1.0)), Loop()

    def rising(step: int) -> float:
        loop.risen, loop.gap = 0.05 * max(0, step - 150), gap if step > 150 else 0.0
        return 3.0 + loop.risen

    _, events = run(watch, loop, rising, 2000)
    asked = [q.at for q in loop.asked if isinstance(q, Survey)]
    looks = [q for q in loop.asked if isinstance(q, CompareLosses)]
    assert 3 <= len(asked) <= 7
    assert len(looks) <= 12 * len(asked)
    assert not kinds(events, Demotion)


def test_after_an_unclear_verdict_looks_wait_as_well() -> None:
    watch, loop, state = _acquitted_rise(probe=Probe(every_n_steps=10_000))
    loop.gap, loop.fails = 0.2, True
    unclear = replace(state.fallback, phase="suspect", onset=150, quiet_until=190)
    look = CompareLosses(at=172, count=8)
    seen = LossesCompared(losses=tuple(3.2 + 0.001 * i for i in range(8)), high_losses=(3.0,) * 8)
    for fallback, surveys in ((unclear, 0), (replace(unclear, quiet_until=170), 1)):
        state = replace(state, fallback=fallback)
        loop.asked.clear()
        tell(watch, state, Answered(question=look, answer=seen), loop)
        assert len([q for q in loop.asked if isinstance(q, Survey)]) == surveys


def test_no_layer_climbs_while_the_level_is_learned_again() -> None:
    watch, loop = machine(), Loop()
    state, _ = run(watch, loop, lambda _: 3.0, 100)
    for step in range(100, 104):  # the learning rate has risen by a factor of 100
        faster = replace(signals(step), lr=0.1)
        state, _ = tell(watch, state, StepSeen(at=step + 1, signals=faster), loop)
        state, _ = tell(watch, state, _over(step + 1), loop)
    assert not [q for q in loop.asked if isinstance(q, Climb)]
    for step in range(104, 170):
        faster = replace(signals(step), lr=0.1)
        state, _ = tell(watch, state, StepSeen(at=step + 1, signals=faster), loop)
    for at in (170, 171, 172):
        state, _ = tell(watch, state, _over(at), loop)
    assert [q for q in loop.asked if isinstance(q, Climb)]


def _over(at: int) -> Looked:
    excess = Excess(
        layer="head", operand="input", statistic="underflow_fraction", value=0.9, limit=0.25
    )
    return Looked(at=at, names=tuple(LOW), excesses={"head": excess})


def test_a_rise_seen_in_the_trajectory_alone_overrules_a_gap() -> None:
    """The detector has not noticed it: the loss is mostly noise, and both formats part in chaos."""
    watch, loop = machine(), Loop(error=0.9, gap=0.2)
    level = loop.answer

    def answer(question: Question[Any]) -> Answer:
        if isinstance(question, Survey):
            told: Any = level(question)
            losses = tuple(3.0 + 0.05 * max(0, i - 8) for i in range(len(told.losses)))
            return replace(told, losses=losses)
        if isinstance(question, ReplayStretch):
            told = level(question)
            losses = tuple(3.0 + 0.045 * max(0, i - 8) for i in range(len(told.losses)))
            return replace(told, losses=losses)
        return level(question)

    loop.answer = answer  # type: ignore[method-assign]
    _, events = run(watch, loop, lambda _: 3.0, 66)
    verdicts = [(event.tier, event.verdict) for event in kinds(events, Verdict)]
    assert ("gap", "precision") in verdicts
    assert ("trajectory", "not precision") in verdicts
    assert not kinds(events, Demotion)


def test_an_acquittal_says_what_high_precision_cannot_heal() -> None:
    loop = Loop(harm=0.0, stored=2)
    state, _ = run(machine(), loop, lambda _: 3.0, 160)
    _, events = tell(machine(), state, Asked(at=160, onset=150), loop)
    (note,) = kinds(events, Note)
    assert note.reason.startswith("formats stay as they are; ")
    assert "but 2 frozen layers keep their weights only in FP8: high precision" in note.reason


def test_where_all_is_high_nothing_is_replayed() -> None:
    loop = Loop(low={})
    state, events = tell(machine(), WatchState(), Asked(at=100, onset=90), loop)
    assert [type(question) for question in loop.asked] == [Survey]
    assert "already" in kinds(events, Note)[0].reason
    assert state.fallback.acquittals == 1


def test_a_replay_that_fails_leaves_the_case_unclear() -> None:
    state, events = tell(machine(), WatchState(), Asked(at=100, onset=90), Loop(fails=True))
    assert "no memory" in kinds(events, Note)[0].reason
    assert state.inquiry is None
    assert state.fallback.doubts == 1


def test_layers_over_a_limit_climb_and_demoted_ones_come_back() -> None:
    watch, loop = machine(policy=FallbackPolicy(hold=20)), Loop(harm=0.5)
    state, events = run(watch, loop, rises_at(150, loop), 160)
    excess = Excess(layer="head", operand="input", statistic="clamped_mass", value=0.2, limit=0.01)
    for at in (160, 161, 162):
        look = Looked(at=at, names=tuple(LOW), excesses={"head": excess})
        state, more = tell(watch, state, look, loop)
        events += more
    (climb,) = kinds(events, LayerClimb)
    assert climb.formats == {"head": (FP8, "fp8-rowwise")}
    assert CheckCure(at=162, layers=("head",)) in loop.asked
    state, more = run(watch, loop, lambda _: 3.0, 40, state, start=163)
    (promotion,) = kinds(more, Promotion)
    assert promotion.formats == {"blocks.0.fc": ("bf16", FP8)}
    assert state.fallback.phase == "healthy"


# --- Laws ---------------------------------------------------------------------------------------

_FLOATS = st.one_of(st.floats(2.5, 3.5), st.just(math.nan), st.just(math.inf), st.none())


def _step_seen(at: int, loss: float | None, skipped: bool) -> StepSeen:
    seen = StepSignals(
        step=at - 1, loss=loss, grad_norm=loss, lr=1e-3, headroom=-2.0, skipped=skipped
    )
    return StepSeen(at=at, signals=seen)


_STEPS = st.integers(1, 500)
_QUESTIONS: list[tuple[Question[Any], Answer]] = [
    (ProbeStep(at=3), Probed(error=math.inf, replays=2)),
    (Attribute(healthy=0.15), Attributed(found=None)),
    (ReplayStep(), Failed(error="odd")),
    (Climb(at=2, layer="head", reason="over"), Failed(error="odd")),
    (CompareLosses(at=2, count=8), LossesCompared(losses=(9.0,) * 8, high_losses=(3.0,) * 8)),
    (CheckCure(at=2, layers=("head",)), Failed(error="odd")),
]
HAPPENINGS = st.one_of(
    st.just(Attempted()),
    st.builds(_step_seen, _STEPS, _FLOATS, st.booleans()),
    st.just(FormatsChanged(layers=("head",))),
    st.builds(Looked, at=_STEPS, names=st.just(tuple(LOW)), sound=st.booleans()),
    st.builds(Boundary, at=_STEPS, sound=st.booleans()),
    st.builds(Settled, at=_STEPS),
    st.builds(Asked, at=_STEPS, onset=_STEPS, risen=st.booleans()),
    st.builds(Ended, at=_STEPS),
    st.sampled_from([Answered(question=q, answer=a) for q, a in _QUESTIONS]),
)


@given(st.lists(HAPPENINGS, max_size=30), st.floats(-1, 1), st.booleans())
def test_any_order_of_happenings_ends_in_a_state_that_is_sound(
    happenings: list[Happening], harm: float, finite: bool
) -> None:
    """No order raises; a case never stays open; nothing is demoted that was not low."""
    watch, loop = machine(), Loop(harm=harm, finite=finite)
    state = watch.init()
    for happening in happenings:
        before = watch.state_dict(state)
        after, events = tell(watch, state, happening, loop)
        assert watch.state_dict(state) == before  # old states stay usable
        assert after.inquiry is None
        for event in kinds(events, Demotion):
            assert set(event.formats) <= set(LOW)
        state = after
        assert state.steps.replayed >= 0


@given(st.lists(HAPPENINGS, max_size=20), st.lists(HAPPENINGS, max_size=10))
def test_a_saved_state_decides_as_the_one_that_was_saved(
    before: list[Happening], after: list[Happening]
) -> None:
    watch, loop = machine(), Loop(harm=0.5)
    state = watch.init()
    for happening in before:
        state, _ = tell(watch, state, happening, loop)
    loaded = watch.load_state_dict(json.loads(json.dumps(watch.state_dict(state))))
    for happening in after:
        state, told = tell(watch, state, happening, loop)
        loaded, again = tell(watch, loaded, happening, loop)
        assert str([e.sentence() for e in told]) == str([e.sentence() for e in again])
    assert str(watch.state_dict(state)) == str(watch.state_dict(loaded))


@st.composite
def _script(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Pieces of a run: for some steps a loss, a rate, values that are cast, a loop that answers."""
    piece = st.fixed_dictionaries(
        {
            "steps": st.integers(1, 12),
            "loss": st.sampled_from([3.0, 3.0, 3.0, 3.4, 6.0, 0.0, math.nan]),
            "lr": st.sampled_from([1e-3, 1e-3, 3e-3]),
            "amax": st.sampled_from([None, 1.0, 64.0]),
            "skipped": st.booleans(),
            "over": st.booleans(),
            "harm": st.sampled_from([0.0, 0.0, 0.2, 0.6]),
            "gap": st.sampled_from([0.0, 0.0, 0.2]),
            "error": st.sampled_from([0.05, 0.9]),
            "eager": st.sampled_from([1.0, 0.0]),
        }
    )
    return draw(st.lists(piece, min_size=1, max_size=4))


def _happenings(at: int, piece: dict[str, Any], *, last: bool) -> list[Happening]:
    """Of one step, as they come in a run."""
    skipped = piece["skipped"] and at % 7 == 0
    seen = replace(signals(at - 1, piece["loss"], skipped=skipped), lr=piece["lr"])
    happenings: list[Happening] = [Attempted(), StepSeen(at=at, signals=seen)]
    if piece["over"] and at % 5 == 0:
        happenings.append(_over(at))
    if piece["amax"] is not None:
        amax = torch.ones(len(LOW), 2)
        amax[0, 0] = piece["amax"] if at % 9 == 0 else 1.0
        happenings.append(AmaxSeen(at=at, step=at - 1, amax=amax))
    happenings += [Boundary(at=at), Settled(at=at)]
    return [*happenings, Ended(at=at)] if last else happenings


@cache
def _armed() -> WatchState:
    """After a healthy beginning; states are never changed, so all examples begin with this one."""
    state, _ = run(_short(), Loop(), lambda _: 3.0, 66)
    return state


def _short() -> Watch:
    return machine(policy=FallbackPolicy(grace=10, hold=20))


@settings(max_examples=20, deadline=None)
@given(_script(), st.floats(0, 1))
def test_a_run_that_is_resumed_anywhere_decides_and_acts_as_without(
    script: list[dict[str, Any]], part: float
) -> None:
    """And so do two ranks, which see the same reduced signals: all of a decision is its state."""
    answers = ("harm", "gap", "error", "eager")
    loops, watches = (Loop(), Loop()), (_short(), _short())
    states = [_armed(), _armed()]
    length = 66 + sum(piece["steps"] for piece in script)
    resumed, at = 66 + int(part * (length - 66)), 66
    for piece in script:
        for loop in loops:
            vars(loop).update({name: piece[name] for name in answers})
        for _ in range(piece["steps"]):
            if at == resumed:  # the other begins anew from a checkpoint
                file = BytesIO()
                torch.save(watches[1].state_dict(states[1]), file)
                file.seek(0)
                states[1] = _short().load_state_dict(torch.load(file, weights_only=True))
            at += 1
            for happening in _happenings(at, piece, last=at == length):
                told = []
                for which, (watch, loop) in enumerate(zip(watches, loops, strict=True)):
                    states[which], events = tell(watch, states[which], happening, loop)
                    told.append([(type(event), event.sentence()) for event in events])
                assert told[0] == told[1]
    assert loops[0].asked == loops[1].asked
    assert str(loops[0].done) == str(loops[1].done)
    first, second = (str(w.state_dict(s)) for w, s in zip(watches, states, strict=True))
    assert first == second


def test_a_state_of_another_version_is_refused() -> None:
    saved = {**machine().state_dict(WatchState()), "version": 7}
    with pytest.raises(ValueError, match="the watch's state must have version 1, got 7"):
        machine().load_state_dict(saved)


@pytest.mark.parametrize("left_over", [False, True])
def test_culprits_that_a_demotion_left_over_follow_at_once(left_over: bool) -> None:
    """No loss tells of them: what was proved once needs no trajectory to be proved again."""
    loop = Loop(harm=0.5)
    other = replace(CULPRIT, culprits={"head": 0.5}, formats={"head": HIGH})
    state, events = run(machine(), loop, rises_at(150, loop), 156)
    (first,) = kinds(events, Demotion)
    loop.harm, loop.error = 0.0, 0.6 if left_over else 0.2
    loop.found = lambda _: other
    state, events = run(machine(), loop, lambda _: 3.0, 4, state, start=156)
    demotions = kinds(events, Demotion)
    assert len(demotions) == left_over
    for demotion in demotions:
        assert demotion.step <= first.step + 5
        assert demotion.formats == {"head": (FP8, "bf16")}  # the group is for what comes back
        assert "not cured" in kinds(events, Verdict)[0].reason
    assert state.fallback.demotions == 1


def test_gradients_of_before_a_demotion_need_more_proof() -> None:
    """The same error on two batches, in a run that has not been convicted of anything."""
    loop = Loop(error=0.6)
    _, events = run(machine(), loop, lambda _: 3.0, 200)
    assert not kinds(events, Demotion)


@pytest.mark.parametrize(
    ("before", "demoted"),
    [(0.21, set(LOW)), (0.45, {"blocks.0.fc"})],
    ids=["another small one", "part of it"],
)
def test_weights_from_before_that_do_not_show_the_fault_name_nobody(
    before: float, demoted: set[str]
) -> None:
    """On those of now no few layers explain it: then all, but for what the older ones show."""
    loop = Loop(harm=0.5, error=3.0)
    older = replace(CULPRIT, error=before)
    nobody = replace(CULPRIT, culprits={}, formats={}, rest=1.0)
    loop.found = lambda weights: nobody if weights is None else older
    _, events = run(machine(), loop, rises_at(150, loop), 170)
    assert set(kinds(events, Demotion)[0].formats) == demoted


def settle(watch: Watch, loop: Loop, error: float) -> list[type[Action]]:
    """What is done once the only snapshot is to give way; probes are answered at once."""
    state, _ = run(watch, loop, lambda _: 3.0, 100)
    loop.error = error
    loop.asked.clear()
    loop.done.clear()
    for step in (110, 111, 112):
        state, _ = tell(watch, state, Settled(at=step, only=True), loop)
    return [type(each) for each in (*loop.asked, *loop.done)]


def test_the_only_snapshot_gives_way_to_a_state_that_was_looked_at() -> None:
    assert settle(machine(), Loop(), error=0.05) == [ProbeStep, TakeSnapshot, TakeSnapshot]
    assert settle(machine(probe=None), Loop(), error=0.9)[0] is TakeSnapshot


def test_the_only_snapshot_stays_where_the_look_is_alarming() -> None:
    done = settle(machine(), Loop(harm=0.5), error=0.9)
    assert done[0] is ProbeStep
    assert done.index(Write) < done.index(GoBack)
    assert TakeSnapshot not in done[: done.index(GoBack)]
