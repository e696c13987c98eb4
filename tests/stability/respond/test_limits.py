"""Layer limits: which layers are over them, and when one climbs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp import PrecisionMap, convert
from lightning_fp.layers.statistics_table import OPERANDS, StatisticsTable
from lightning_fp.numerics import COLUMN, STATISTICS, shares
from lightning_fp.stability.respond.limits import Excess, LayerLimit, LimitState, LimitWatch
from lightning_fp.statistic_names import called, measured
from tests.helper import TinyGPT, next_byte_loss, text_rows


def train(model: TinyGPT, table: PrecisionMap, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(steps):
        optimizer.zero_grad()
        next_byte_loss(model, text_rows(64)[4 * index : 4 * index + 4]).backward()
        optimizer.step()
        table.step()


def sampled(format: str = "fp8-delayed", fault: str = "none") -> tuple[Tensor, list[str]]:
    """One step's statistics of a real model with a fault in blocks.1.fc1."""
    torch.manual_seed(0)
    model = TinyGPT()
    table = convert(model, format).precision_map
    assert table is not None
    train(model, table, 4)
    layer: Any = table.layers["blocks.1.fc1"]
    if fault == "input scale":
        layer.memory.scales[0] *= 64
    elif fault == "gradient scale":
        layer.memory.scales[2] *= 256
    elif fault == "tiny":
        layer.memory.scales[0] /= 2**16
    elif fault == "hot channel":
        layer.register_forward_pre_hook(lambda _, x: x[0] * hot_channel(x[0].shape[-1]))
    elif fault == "inf":
        layer.register_forward_pre_hook(lambda _, x: x[0].index_fill(-1, torch.tensor(0), math.inf))
    statistics = StatisticsTable(dict(table.layers), stride=1)  # pyright: ignore
    statistics.collect(True)
    next_byte_loss(model, text_rows(64)[16:20]).backward()
    rows, names = statistics.take(), statistics.names
    statistics.close()
    return rows, names


def hot_channel(features: int) -> Tensor:
    """One in each block of 32, so that finer scales see it too."""
    return torch.ones(features).index_fill(0, torch.arange(3, features, 32), 2.0**22)


def over_by_hand(rows: Tensor, names: Sequence[str], limit: LayerLimit) -> dict[str, set[str]]:
    """Which statistics of each layer are over their limits, one number at a time."""
    found: dict[str, set[str]] = {}
    for name, layer in zip(names, rows, strict=True):
        for operand in ("input", "weight", "grad_output"):
            row = layer[OPERANDS.index(operand)]
            read = {key: float(value) for key, value in shares(row).items()}
            tests = {
                "nonfinite": limit.nonfinite is not None
                and float(row[COLUMN["nonfinite"]]) > limit.nonfinite,
                "clamped_mass": limit.clamped_mass is not None
                and read["clamped_mass"] > limit.clamped_mass,
                "sqnr_db": limit.sqnr_db is not None and read["sqnr_db"] < limit.sqnr_db,
                "underflow_fraction": limit.underflow is not None
                and operand != "grad_output"
                and read["underflow_fraction"] > limit.underflow,
            }
            over = {statistic for statistic, value in tests.items() if value}
            if over:
                found.setdefault(name, set()).update(over)
    return found


# -- what is over a limit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "format", ["fp8-delayed", "fp8-dynamic", "fp8-rowwise", "fp8-block", "mxfp8"]
)
def test_healthy_layers_are_not_over(format: str) -> None:
    rows, names = sampled(format)
    assert LimitWatch(LayerLimit(), len(names)).excesses(rows, names) == {}


@pytest.mark.parametrize(
    ("fault", "operand", "statistic"),
    [
        ("input scale", "input", "clamped_mass"),
        ("gradient scale", "grad_output", "clamped_mass"),
        ("tiny", "input", "sqnr_db"),
    ],
)
def test_the_layer_and_the_operand_at_fault(fault: str, operand: str, statistic: str) -> None:
    rows, names = sampled(fault=fault)
    limit = LayerLimit()
    found = LimitWatch(limit, len(names)).excesses(rows, names)
    assert list(found) == ["blocks.1.fc1"]
    excess = found["blocks.1.fc1"]
    assert (excess.operand, excess.statistic) == (operand, statistic)
    row = rows[names.index("blocks.1.fc1"), OPERANDS.index(operand)]
    assert excess.value == shares(row)[statistic]
    assert excess.limit == getattr(limit, statistic)
    value = measured(statistic, excess.value)
    assert excess.sentence.startswith(f"{called(statistic)} of {operand} is {value} (limit ")


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-rowwise", "mxfp8"])
def test_a_channel_that_hides_all_others_shows_in_the_underflow_alone(format: str) -> None:
    rows, names = sampled(format, fault="hot channel")
    limit = LayerLimit()
    found = LimitWatch(limit, len(names)).excesses(rows, names)["blocks.1.fc1"]
    assert (found.operand, found.statistic) == ("input", "underflow_fraction")
    assert found.value > 0.6
    without = LimitWatch(LayerLimit(underflow=None), len(names)).excesses(rows, names)
    assert "blocks.1.fc1" not in without


def test_underflow_of_gradients_is_healthy() -> None:
    rows = torch.zeros(1, len(OPERANDS), len(STATISTICS), dtype=torch.float64)
    rows[..., COLUMN["nonzero"]] = 100
    rows[0, OPERANDS.index("grad_output"), COLUMN["underflow"]] = 90
    watch = LimitWatch(LayerLimit(), 1)
    assert watch.excesses(rows, ["a"]) == {}
    rows[0, OPERANDS.index("weight"), COLUMN["underflow"]] = 26
    assert watch.excesses(rows, ["a"])["a"].sentence == ("underflow of weight is 26% (limit 25%)")


@pytest.mark.parametrize("fault", ["none", "input scale", "gradient scale", "tiny", "hot channel"])
@pytest.mark.parametrize("mass", [None, 0.0, 0.01, 0.5])
@pytest.mark.parametrize("sqnr_db", [None, 15.0, 27.0, 40.0])
def test_excesses_equal_a_look_at_every_number(
    fault: str, mass: float | None, sqnr_db: float | None
) -> None:
    rows, names = sampled(fault=fault)
    limit = LayerLimit(clamped_mass=mass, sqnr_db=sqnr_db)
    found = LimitWatch(limit, len(names)).excesses(rows, names)
    by_hand = over_by_hand(rows, names, limit)
    assert found.keys() == by_hand.keys()
    for name, excess in found.items():
        assert excess.statistic in by_hand[name]
        assert (excess.statistic == "clamped_mass") == ("clamped_mass" in by_hand[name])


def test_the_worst_operand_is_named() -> None:
    rows = torch.zeros(1, len(OPERANDS), len(STATISTICS), dtype=torch.float64)
    rows[..., COLUMN["magnitude"]] = 1
    for operand, mass in (("input", 0.1), ("weight", 0.3), ("grad_output", 0.2)):
        rows[0, OPERANDS.index(operand), COLUMN["excess"]] = mass
    rows[0, OPERANDS.index("output"), COLUMN["excess"]] = 0.9  # it is no cast
    assert LimitWatch(LayerLimit(), 1).excesses(rows, ["a"])["a"].operand == "weight"


def test_what_was_not_seen_is_not_over() -> None:
    rows = torch.zeros(3, len(OPERANDS), len(STATISTICS), dtype=torch.float64)
    watch = LimitWatch(LayerLimit(clamped_mass=0.0, sqnr_db=math.inf), 3)
    assert watch.excesses(rows, list("abc")) == {}
    assert watch.excesses(rows[:0], []) == {}


def test_inf_in_few_layers_is_over_the_limit_and_in_most_it_is_no_layers_fault() -> None:
    """inf and NaN spread: the layer that shows them is not the one that made them."""
    rows = torch.zeros(5, len(OPERANDS), len(STATISTICS), dtype=torch.float64)
    watch = LimitWatch(LayerLimit(), 5)
    rows[1:3, OPERANDS.index("grad_output"), COLUMN["nonfinite"]] = 7
    found = watch.excesses(rows, list("abcde"))
    assert {name: (e.statistic, e.value) for name, e in found.items()} == {
        "b": ("nonfinite", 7),
        "c": ("nonfinite", 7),
    }
    rows[3, OPERANDS.index("input"), COLUMN["nonfinite"]] = 1
    assert watch.excesses(rows, list("abcde")) == {}
    assert LimitWatch(LayerLimit(nonfinite=None), 5).excesses(rows, list("abcde")) == {}


def test_inf_in_a_real_model_spreads_to_all_layers() -> None:
    rows, names = sampled(fault="inf")
    assert (rows[..., COLUMN["nonfinite"]] > 0).any(dim=1).sum() > len(names) / 2
    assert LimitWatch(LayerLimit(), len(names)).excesses(rows, names) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamped_mass": -0.1}, "clamped_mass must be None or at least 0, got -0.1"),
        ({"clamped_mass": math.nan}, "clamped_mass must be a number or None, got nan"),
        ({"sqnr_db": math.nan}, "sqnr_db must be a number or None, got nan"),
        ({"underflow": -0.1}, "underflow must be None or at least 0, got -0.1"),
        ({"nonfinite": -1}, "nonfinite must be None or at least 0, got -1"),
        ({"budget": -1}, "budget must be None or at least 0, got -1"),
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"patience": 1.5}, "patience must be a whole number, got 1.5"),
        ({"cooldown": 0}, "cooldown must be an integer of at least 1, got 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerLimit(**options)


# -- when a layer climbs ------------------------------------------------------------------------


def excess(name: str) -> Excess:
    return Excess(layer=name, operand="input", statistic="clamped_mass", value=0.5, limit=0.01)


def watch_of(layers: int = 4, **options: Any) -> LimitWatch:
    return LimitWatch(LayerLimit(**options), layers)


def climbs(watch: LimitWatch, looks: Sequence[str], layers: str = "abcd") -> list[str]:
    """Which layers climb at each look; a look is written as the names that are over."""
    state, climbed = watch.init(), []
    for over in looks:
        state, climbing = watch.step(state, {n: excess(n) for n in over}, list(layers))
        climbed.append("".join(e.layer for e in climbing))
    return climbed


def test_patience() -> None:
    watch = watch_of(patience=3)
    assert climbs(watch, ["a", "a", "a"]) == ["", "", "a"]
    assert climbs(watch, ["a", "a", "", "a", "a", "a"]) == ["", "", "", "", "", "a"]
    assert climbs(watch, ["ab", "a", "ab", "b", "b"]) == ["", "", "a", "", "b"]


@pytest.mark.parametrize("cooldown", [1, 2, 5])
def test_cooldown(cooldown: int) -> None:
    watch = watch_of(patience=1, cooldown=cooldown)
    looks = climbs(watch, ["a"] * (2 * cooldown + 3))
    assert [i for i, names in enumerate(looks) if names] == [0, cooldown + 1, 2 * cooldown + 2]


def test_budget() -> None:
    watch = watch_of(patience=1, budget=2)
    assert climbs(watch, ["a", "bcd", "d"]) == ["a", "b", ""]
    assert climbs(watch_of(patience=1, budget=0), ["a"] * 3) == ["", "", ""]
    assert (watch_of(3).budget, watch_of(30).budget) == (8, 30)


def test_watching_ends_with_the_excess_the_cooldown_or_the_budget() -> None:
    watch = watch_of(patience=2, cooldown=3, budget=1)
    state = watch.init()
    assert not watch.watching(state)
    state, _ = watch.step(state, {"a": excess("a")}, "abcd")
    assert watch.watching(state)
    healed, _ = watch.step(state, {}, "abcd")
    assert not watch.watching(healed)
    climbed, _ = watch.step(state, {"a": excess("a")}, "abcd")
    assert not watch.watching(climbed)
    spent, _ = watch.step(climbed, {"b": excess("b")}, "abcd")
    assert not watch.watching(spent)


def test_a_layer_at_rest_does_not_keep_the_watch_awake() -> None:
    watch = watch_of(patience=1, cooldown=3)
    state, _ = watch.step(watch.init(), {"a": excess("a")}, "abcd")
    state, climbing = watch.step(state, {"a": excess("a")}, "abcd")
    assert not climbing
    assert not watch.watching(state)


def test_layers_not_looked_at_keep_their_count() -> None:
    watch = watch_of(patience=2)
    state, _ = watch.step(watch.init(), {"a": excess("a")}, ["a", "b"])
    state, _ = watch.step(state, {"b": excess("b")}, ["b"])
    assert state.over == {"a": 1, "b": 1}
    state, climbing = watch.step(state, {"a": excess("a")}, ["a"])
    assert [e.layer for e in climbing] == ["a"]


def test_a_layer_that_somebody_else_has_changed_begins_anew() -> None:
    """Else one that went to high precision would be waited for at every step."""
    watch = watch_of(patience=3)
    state, _ = watch.step(watch.init(), {"a": excess("a"), "b": excess("b")}, "abcd")
    state = watch.forget(state, ["a", "d"])
    assert state.over == {"b": 1}
    assert not watch.watching(watch.forget(state, ["b"]))


LOOKS = st.lists(
    st.tuples(st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef"))), max_size=60
)


@settings(max_examples=200)
@given(
    LOOKS,
    st.integers(1, 4),
    st.integers(1, 8),
    st.none() | st.integers(0, 12),
    st.integers(0, 59),
)
def test_laws(
    looks: list[tuple[set[str], set[str]]],
    patience: int,
    cooldown: int,
    budget: int | None,
    saved_at: int,
) -> None:
    watch = watch_of(6, patience=patience, cooldown=cooldown, budget=budget)
    state, last, total = watch.init(), dict.fromkeys("abcdef", -1000), 0
    in_a_row = dict.fromkeys("abcdef", 0)
    for index, (looked, over) in enumerate(looks):
        if index == saved_at:
            state = saved_and_loaded(watch, state)
        before = asdict(state)
        excesses = {name: excess(name) for name in sorted(over & looked)}
        after, climbing = watch.step(state, excesses, sorted(looked))
        assert asdict(state) == before  # old states stay usable
        for name in looked:
            in_a_row[name] = in_a_row[name] + 1 if name in over else 0
        for climbed in climbing:
            assert in_a_row[climbed.layer] >= patience
            assert index - last[climbed.layer] > cooldown
            last[climbed.layer], in_a_row[climbed.layer] = index, 0
        total += len(climbing)
        assert total == after.climbs <= watch.budget
        free = [n for n, count in in_a_row.items() if count and index - last[n] >= cooldown]
        assert watch.watching(after) == (bool(free) and total < watch.budget)
        state = after


def saved_and_loaded(watch: LimitWatch, state: LimitState) -> LimitState:
    file = io.BytesIO()
    torch.save(watch.state_dict(state), file)
    file.seek(0)
    loaded = watch.load_state_dict(torch.load(file, weights_only=True))
    assert loaded == state
    return loaded
