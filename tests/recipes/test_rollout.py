"""The state machine of a rollout: every move, without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp import recipes
from lightning_fp.recipes import (
    Gate,
    Rollout,
    RolloutDecision,
    RolloutRecipe,
    RolloutSignals,
    RolloutState,
    Stage,
    formats_by_stage,
)
from lightning_fp.recipes.evidence import judge
from lightning_fp.recipes.rollout import LOSS_WINDOW

LAYERS = {"*": "high"}


def make(*stages: Stage) -> Rollout:
    return Rollout(RolloutRecipe(name="test", stages=stages))


def gated(on_fail: Any = "hold", **options: Any) -> Rollout:
    """Ten steps, ten steps behind a gate that looks back five, and the end."""
    gate = Gate(statistic="x", below=1.0, window=5)
    return make(
        Stage(name="one", layers=LAYERS, until={"steps": 10}),
        Stage(
            name="two",
            layers=LAYERS,
            until={"steps": 10},
            gates=(gate,),
            on_fail=on_fail,
            **options,
        ),
        Stage(name="three", layers=LAYERS),
    )


def drive(
    rollout: Rollout,
    steps: int,
    x: Mapping[int, float] | None = None,
    *,
    held: range = range(0),
    state: RolloutState | None = None,
    start: int = 0,
) -> tuple[RolloutState, dict[int, RolloutDecision]]:
    """All decisions but "none", by step; `x` are the gate's values, 0 where none is given."""
    state = rollout.init() if state is None else state
    decisions: dict[int, RolloutDecision] = {}
    for step in range(start, steps):
        value = 0.0 if x is None else x.get(step, 0.0)
        signals = RolloutSignals(
            step=step,
            share=step / steps,
            tokens=step * 100,
            values={"x": [(step, value)], "loss": [(step, 10.0 - step / 10)]},
            held="demoted" if step in held else "",
        )
        state, decision = rollout.step(state, signals)
        if decision.action != "none":
            decisions[step] = decision
    return state, decisions


def moves(decisions: Mapping[int, RolloutDecision]) -> dict[int, str]:
    return {step: decision.action for step, decision in decisions.items()}


@pytest.mark.parametrize(
    ("until", "at", "said"),
    [
        ({"steps": 7}, 7, "the stage has lasted 7 steps (due at 7)"),
        ({"tokens": 650}, 7, "700 tokens are seen (due at 650)"),
        ({"share": 0.07}, 7, "7.0% of the run is done (due at 7.0%)"),
        # the mean of 50 steps falls below after half of them
        ({"loss": 5.0}, 75, "the loss is 4.95 (due below 5)"),
        ({"steps": 7, "tokens": 2000}, 20, "2,000 tokens are seen (due at 2,000)"),
    ],
)
def test_how_a_stage_ends(until: Any, at: int, said: str) -> None:
    rollout = make(Stage(name="one", layers=LAYERS, until=until), Stage(name="two", layers=LAYERS))
    _, decisions = drive(rollout, 100)
    assert moves(decisions) == {0: "enter", at: "enter"}
    assert said in decisions[at].reason


def test_a_loss_needs_a_whole_window() -> None:
    rollout = make(
        Stage(name="one", layers=LAYERS, until={"loss": 100.0}), Stage(name="two", layers=LAYERS)
    )
    assert moves(drive(rollout, 100)[1]) == {0: "enter", LOSS_WINDOW: "enter"}


def test_a_gate_that_passes_lets_the_rollout_on() -> None:
    state, decisions = drive(gated(), 40)
    assert moves(decisions) == {0: "enter", 10: "enter", 20: "enter"}
    assert decisions[20].reason == "the stage has lasted 10 steps (due at 10); all gates pass"
    assert state.stage == 2


def test_a_gate_that_fails_holds_until_its_window_is_clean() -> None:
    state, decisions = drive(gated(), 60, {17: 2.0, 30: 2.0})
    assert moves(decisions) == {0: "enter", 10: "enter", 22: "enter"}
    assert state.stage == 2


def test_verdicts_are_told_once() -> None:
    rollout, state = gated(), None
    state = rollout.init()
    told = []
    for step in range(30):
        x = 3.0 if step == 17 else math.nan if step < 17 else 0.5
        signals = RolloutSignals(step=step, values={"x": [(step, x)]})
        state, decision = rollout.step(state, signals)
        told += [(step, v.answer, v.value) for v in decision.verdicts]
    assert [(step, answer) for step, answer, _ in told] == [
        (15, "no data"),
        (17, "failed"),
        (22, "passed"),
    ]
    assert [value for *_, value in told[1:]] == [3.0, 0.5]


def test_what_was_measured_before_a_stage_is_no_evidence() -> None:
    """Values of step 10 are from before the entry at 10; the gate has none of its own."""
    rollout, state = gated(), gated().init()
    for step in range(40):
        values = {"x": [(step, 0.0)]} if step <= 10 else {}
        state, _ = rollout.step(state, RolloutSignals(step=step, values=values))
    assert rollout.stage(state) == rollout.recipe.stages[1]
    assert state.answers == {"0": "no data"}


def test_stepping_back_waits_longer_each_time_and_ends() -> None:
    failing = dict.fromkeys(range(1000), 2.0)
    state, decisions = drive(gated("step_back"), 200, failing)
    assert moves(decisions) == {
        0: "enter",
        10: "enter",
        15: "step_back",
        25: "enter",  # stage one's own ten steps
        30: "step_back",
        40: "enter",  # twice the window
        45: "step_back",
    }
    assert decisions[15].reason == (
        "x is 2, must be below 1 (worst of 5 steps); try 1 of 3, back for at least 5 steps"
    )
    assert decisions[45].reason.endswith("try 3 of 3, back for good")
    assert (state.stage, state.ended) == (0, "stage 'two' was given up 3 times")


def test_the_wait_holds_where_the_share_is_reached_already() -> None:
    gate = Gate(statistic="x", below=1.0, window=5)
    rollout = make(
        Stage(name="one", layers=LAYERS, until={"share": 0.1}),
        Stage(name="two", layers=LAYERS, gates=(gate,), on_fail="step_back", max_tries=9),
    )
    _, decisions = drive(rollout, 100, dict.fromkeys(range(100), 2.0))
    entered = [step for step, action in moves(decisions).items() if action == "enter"]
    assert entered == [0, 10, 20, 35, 60]  # waits of 5, 10, 20, 40


def test_stopping_is_for_good() -> None:
    state, decisions = drive(gated("stop"), 100, {16: 2.0})
    assert moves(decisions) == {0: "enter", 10: "enter", 16: "stop"}
    assert decisions[16].reason == "a gate failed: x is 2, must be below 1 (worst of 5 steps)"
    assert state.stage == 1


def test_stages_without_effect_are_passed_over_in_both_directions() -> None:
    gate = Gate(statistic="x", below=1.0, window=5)
    stages = (
        Stage(name="high", layers={"*": "high"}, until={"steps": 2}),
        Stage(name="ends", layers={"blocks[0]": "high"}, until={"steps": 100}),
        Stage(name="all", layers={"*": "configured"}, gates=(gate,), on_fail="step_back"),
    )
    rollout = Rollout(RolloutRecipe(name="a", stages=stages))

    def step(state: RolloutState, at: int, **values: Any) -> tuple[RolloutState, str]:
        seen = {name: [(at, value)] for name, value in values.items()}
        signals = RolloutSignals(step=at, values=seen, skipped=frozenset({1}))
        state, decision = rollout.step(state, signals)
        return state, decision.action

    state, _ = step(rollout.init(), 0)
    state, action = step(state, 2)
    assert (state.stage, action) == (2, "enter")
    for at in range(3, 8):
        state, action = step(state, at, x=9.0)
    assert (state.stage, action) == (0, "step_back")
    # of a checkpoint from when it was not skipped
    state, action = step(RolloutState(stage=1, entered=0), 3)
    assert (state.stage, action) == (2, "enter")


def test_while_held_the_clock_stands_and_evidence_is_void() -> None:
    state, decisions = drive(gated(), 100, {12: 2.0}, held=range(13, 50))
    assert moves(decisions) == {0: "enter", 10: "enter", 57: "enter"}
    _, decisions = drive(gated("stop"), 100, {20: 2.0}, held=range(13, 50))
    assert "stop" not in moves(decisions).values()
    assert state.held == ""


def test_held_before_the_beginning() -> None:
    _, decisions = drive(gated(), 100, held=range(5))
    assert moves(decisions) == {5: "enter", 15: "enter", 25: "enter"}


def test_over_for_good() -> None:
    rollout = gated()
    state, _ = drive(rollout, 12)
    state, decision = rollout.step(state, RolloutSignals(step=12, over="all is high"))
    assert (decision.action, decision.reason, state.stage) == ("stop", "all is high", 1)
    assert drive(rollout, 100, state=state, start=13)[1] == {}


def test_a_last_stage_with_an_end_is_guarded_until_then() -> None:
    gate = Gate(statistic="x", below=1.0, window=5)
    last = Stage(name="two", layers=LAYERS, until={"steps": 20}, gates=(gate,), on_fail="step_back")
    rollout = make(Stage(name="one", layers=LAYERS, until={"steps": 10}), last)
    state, decisions = drive(rollout, 100, {50: 2.0})
    assert moves(decisions) == {0: "enter", 10: "enter", 30: "stop"}
    assert state.ended == "the last stage is over: the stage has lasted 20 steps (due at 20)"


# -- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "answer", "value"),
    [
        ({"below": 2.0}, [1, 3, 1], "failed", 3),
        ({"below": 2.0}, [1, 1.5, 1], "passed", 1.5),
        ({"below": 2.0}, [2], "failed", 2),
        ({"above": 2.0}, [3, 1, 3], "failed", 1),
        ({"above": 0.0, "below": 2.0}, [1, -1, 1], "failed", -1),
        ({"below": 2.0, "reduce": "mean"}, [1, 3, 1], "passed", 5 / 3),
        ({"below": 2.0, "reduce": "last"}, [3, 1], "passed", 1),
        ({"below": 2.0, "reduce": "min"}, [3, 1], "passed", 1),
        ({"above": 2.0, "reduce": "max"}, [3, 1], "passed", 3),
        ({"below": 2.0, "reduce": "sum"}, [1, 1], "failed", 2),
        ({"below": 2.0}, [math.inf], "failed", math.inf),
    ],
)
def test_what_gates_make_of_values(
    options: Any, values: list[float], answer: str, value: float
) -> None:
    gate = Gate(statistic="x", window=10, **options)
    series = tuple((91 + i, float(v)) for i, v in enumerate(values))
    verdict = judge(gate, {"x": ((90, -99.0), *series)}, step=100, lasted=50)
    assert (verdict.answer, verdict.value) == (answer, value)
    assert judge(gate, {"x": series}, step=100, lasted=9).answer == "too early"
    assert judge(gate, {"x": series}, step=200, lasted=50).answer == "no data"


# -- state ----------------------------------------------------------------------------------------


@given(
    st.integers(0, 79),
    st.dictionaries(st.integers(0, 79), st.sampled_from([0.5, 2.0]), max_size=8),
    st.sampled_from(["hold", "step_back", "stop"]),
    st.tuples(st.integers(0, 60), st.integers(0, 20)),
)
def test_interrupted_anywhere_it_goes_on_the_same(
    at: int, x: dict[int, float], on_fail: Any, held: tuple[int, int]
) -> None:
    rollout = gated(on_fail)
    held_at = range(held[0], held[0] + held[1])

    def run(state: RolloutState | None, start: int, stop: int) -> tuple[RolloutState, Any]:
        state = rollout.init() if state is None else state
        told = []
        for step in range(start, stop):
            signals = RolloutSignals(
                step=step,
                values={"x": [(step, x.get(step, 0.0))]},
                held="held" if step in held_at else "",
            )
            state, decision = rollout.step(state, signals)
            told.append(decision)
        return state, told

    whole = run(None, 0, 80)
    first, told = run(None, 0, at)
    saved = json.loads(json.dumps(rollout.state_dict(first)))  # plain numbers and texts
    last, rest = run(rollout.load_state_dict(saved), at, 80)
    assert (last, told + rest) == whole


def test_a_recipe_may_gain_stages_around_the_one_a_run_is_in() -> None:
    state, _ = drive(gated(), 12)
    saved = gated().state_dict(state)
    longer = make(Stage(name="zero", layers=LAYERS, until={"steps": 1}), *gated().recipe.stages)
    assert longer.load_state_dict(saved).stage == 2
    other = make(Stage(name="zero", layers=LAYERS))
    with pytest.raises(ValueError, match=r"'test' cannot go on .* must be one of zero, got 'two'"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match="rollout state must have version 1, got 7"):
        other.load_state_dict({**saved, "version": 7})


# -- formats by stage over a model ---------------------------------------------------------------

MODEL = {f"blocks.{i}.{part}": "fp8-dynamic" for i in range(4) for part in ("up", "down")}
MODEL["head"] = "bf16"


def low_blocks(name: str, **options: Any) -> list[set[int]]:
    entries = formats_by_stage(recipes.get(name, **options), MODEL, high="bf16")
    assert all(entry.formats["head"] == "bf16" for entry in entries)
    return [
        {int(n.split(".")[1]) for n, format in entry.formats.items() if format != "bf16"}
        for entry in entries
    ]


def test_built_in_recipes_do_what_they_say() -> None:
    everything = {0, 1, 2, 3}
    assert low_blocks("conservative") == [set(), {2}, {1, 2}, everything, set()]
    assert low_blocks("balanced") == [set(), {1, 2}, everything]
    assert low_blocks("aggressive") == [set(), everything]
    assert low_blocks("first-last-bf16") == [{1, 2}]
    assert low_blocks("bf16-cooldown") == [everything, set()]
    entries = formats_by_stage(recipes.get("delayed-after-dynamic"), MODEL, high="bf16")
    assert [entry.formats["blocks.0.up"] for entry in entries] == [
        "fp8-dynamic",
        "fp8-delayed",
        "fp8-dynamic",
    ]
    half = dict.fromkeys(MODEL, "fp16")
    entries = formats_by_stage(recipes.get("fp16-rl"), half, high="bf16")
    assert [set(entry.formats.values()) for entry in entries] == [{"bf16"}, {"fp16"}]


def test_layers_keep_what_no_pattern_takes() -> None:
    recipe = RolloutRecipe(
        name="a",
        stages=(
            Stage(name="one", layers={"*.up": "high"}, until={"steps": 1}),
            Stage(name="two", layers={"blocks[0]": "e8m3"}, until={"steps": 1}),
            Stage(name="three", layers={"blocks[0]": "configured", "blocks[-1].up": "fp32"}),
        ),
    )
    one, two, three = formats_by_stage(recipe, MODEL, high="bf16")
    assert one.changes == tuple(f"blocks.{i}.up" for i in range(4))
    assert two.formats["blocks.1.up"] == "bf16"
    assert two.changes == ("blocks.0.up", "blocks.0.down")
    assert three.formats["blocks.0.up"] == "fp8-dynamic"
    assert three.formats["blocks.3.up"] == "fp32"


def test_patterns_that_match_nothing() -> None:
    def first(pattern: str) -> Any:
        stage = Stage(name="one", layers={pattern: "high"})
        return formats_by_stage(RolloutRecipe(name="a", stages=(stage,)), MODEL, high="bf16")[0]

    with pytest.raises(ValueError, match=r"stage 'one': layers: .*'blok.*' matches no .*blocks.3"):
        first("blok.*")
    with pytest.raises(ValueError, match=r"'blocks.0..mlp' matches no layer of the blocks of blo"):
        first("blocks[0].mlp")
    assert first("blocks[9]").idle == ("blocks[9]",)  # of a model that is larger
    stage = Stage(name="one", layers={"blocks[0]": "high"})
    with pytest.raises(ValueError, match="no module of this model has numbered blocks"):
        formats_by_stage(RolloutRecipe(name="a", stages=(stage,)), {"fc": "e8m3"}, high="bf16")
