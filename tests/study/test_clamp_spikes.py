"""The layer whose clamping comes with the spikes is found, and no other is accused."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pytest
import torch

from lightning_fp.study import Loss, clamp_spikes
from lightning_fp.study.alignment import (
    corrected,
    event_average,
    shift_p_value,
    shifted_scores,
)
from lightning_fp.study.series import clamp_series
from tests.study.helper import (
    COLUMNS,
    STEPS,
    noise,
    some_events,
    spiky_loss,
    table,
    tied_masses,
    unrelated_masses,
)

GUILTY = ("blocks.2.fc", "input")


# --- the finding --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_tied_layer_comes_first_and_alone(seed: int):
    events = some_events(10, seed=seed)
    found = clamp_spikes(table(tied_masses(events, seed=seed)), spiky_loss(events, seed=seed))
    assert [spike.step for spike in found.spikes] == events.tolist()
    assert found.layers()[0] == GUILTY[0]
    assert [(tie.layer, tie.operand) for tie in found.significant()] == [GUILTY]
    assert found.ties[0].before > 3 * found.ties[0].elsewhere
    assert max(found.ties[0].curve) == max(
        found.ties[0].curve[6:9]
    )  # two steps before, to the spike
    assert "clamping in blocks.2.fc (input) comes with them" in found.summary()


def test_rows_of_whole_intervals_are_enough():
    events = some_events(10)
    found = clamp_spikes(table(tied_masses(events), interval=10), spiky_loss(events))
    assert found.resolution == 10
    assert [(tie.layer, tie.operand) for tie in found.significant()] == [GUILTY]


def test_overflow_finds_what_sampling_misses():
    events = some_events(10)
    masses = tied_masses(events)
    headroom = {key: 1.0 - 300 * mass for key, mass in masses.items()}
    statistics = table(masses, interval=10, every=10, headroom=headroom)
    loss = spiky_loss(events)
    sampled = clamp_spikes(statistics, loss)
    assert sampled.significant() == []
    exact = clamp_spikes(statistics, loss, statistic="overflow_bits")
    assert [(tie.layer, tie.operand) for tie in exact.significant()] == [GUILTY]
    assert exact.ties[0].samples > sampled.ties[0].samples / 2 > 0


def test_holm_is_not_bolder_than_the_largest_score():
    events = some_events(12, steps=2000)
    statistics = table(tied_masses(events, steps=2000))
    loss = spiky_loss(events, steps=2000)
    by = {how: clamp_spikes(statistics, loss, correction=how) for how in ("max", "holm")}
    assert [tie.layer for tie in by["holm"].significant()] == [GUILTY[0]]
    assert by["max"].ties[0].p_corrected <= by["holm"].ties[0].p_corrected
    for found in by.values():
        assert all(tie.p_corrected >= tie.p_value for tie in found.ties)


def test_clamping_after_the_spike_does_not_count():
    events = some_events(10)
    masses = unrelated_masses(2)
    masses["blocks.0.fc", "grad_output"][events - 1 + 3] += 0.05
    found = clamp_spikes(table(masses), spiky_loss(events), window=4)
    assert found.significant() == []


# --- without a tie ------------------------------------------------------------------------------


def test_p_values_of_unrelated_series_are_uniform():
    runs, steps = 400, 200
    courses = noise(runs, steps, seed=0).clamp(min=0) ** 3
    p = torch.tensor(
        [
            shift_p_value(shifted_scores(course, some_events(3, steps=steps, seed=run), 8))
            for run, course in enumerate(courses)
        ]
    )
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        spread = (level * (1 - level) / runs) ** 0.5
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=3.3 * spread)


def test_few_of_100_unrelated_runs_accuse_a_layer():
    accused = 0
    for run in range(100):
        events = some_events(5, steps=300, seed=1000 + run)
        statistics = table(unrelated_masses(2, steps=300, seed=run))
        found = clamp_spikes(statistics, spiky_loss(events, steps=300, seed=run))
        accused += bool(found.significant())
    assert accused <= 12  # 5 are expected; more than 12 have a chance of 0.2%


# --- the pieces ---------------------------------------------------------------------------------


def test_scores_of_all_shifts_equal_those_of_shifted_events():
    series = noise(50, seed=1).clamp(min=0)
    series[10:14] = torch.nan
    events = torch.tensor([7, 8, 30, 47])
    scores = shifted_scores(series, events, 3)
    for shift in (0, 1, 9, 49):
        moved = shifted_scores(series, (events + shift) % 50, 3)
        assert moved[0] == pytest.approx(float(scores[shift]))


def test_event_average_leaves_out_what_is_not_there():
    series = torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0], dtype=torch.float64)
    average = event_average(series, torch.tensor([0, 3]), 1)
    assert average.tolist() == [pytest.approx(v, nan_ok=True) for v in (torch.nan, 2.5, 3.5)]


def test_holm_steps_down():
    p = torch.tensor([0.01, 0.04, 0.03], dtype=torch.float64)
    assert corrected(p, p, p, "holm").tolist() == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="correction must be one of max, holm, got 'bh'"):
        corrected(p, p, p, "bh")


def test_series_of_intervals_and_formats():
    rows = {
        "step": [10, 10, 10, 20, 30, 30],
        "layer": ["a", "a", "b", "a", "a", "b"],
        "operand": ["input", "input", "input", "input", "input", "output"],
        "sampled_steps": [1, 2, 1, 0, 1, 1],
        "headroom_bits": [0.5, -1.0, 0.1, 0.2, -2.0, None],
        "clamped_mass": [0.1, 0.3, 0.0, None, None, None],
    }
    statistics = pa.table(rows, schema=COLUMNS)
    mass = clamp_series(statistics)
    assert mass.keys == [("a", "input")]
    assert mass.silent == 1
    assert mass.begins.tolist() == [0, 10, 20]
    assert mass.resolution == 10
    # the worse of two formats; known to be 0, as nothing went out of range; unknown
    assert mass.values[0].tolist() == pytest.approx([0.3, 0.0, torch.nan], nan_ok=True)
    assert mass.samples.tolist() == [[3, 0, 0]]
    assert mass.interval_of(torch.tensor([1, 10, 11, 30, 99])).tolist() == [0, 0, 1, 2, 2]
    overflow = clamp_series(statistics, "overflow_bits")
    assert overflow.values[0].tolist() == [1.0, 0.0, 2.0]


# --- degenerate runs ----------------------------------------------------------------------------


def test_without_spikes_there_is_nothing_to_explain():
    quiet = spiky_loss(torch.tensor([100]), height=0.0)
    found = clamp_spikes(table(unrelated_masses(2)), quiet)
    assert found.spikes == ()
    assert {tie.p_corrected for tie in found.ties} == {1.0}
    assert math.isnan(found.ties[0].before)
    assert "no spikes between" in found.summary()
    assert json.loads(json.dumps(found.to_dict()))["ties"][0]["before"] is None


def test_without_clamping_there_is_nobody_to_accuse():
    events = some_events(5)
    masses = {key: torch.zeros(STEPS) for key in unrelated_masses(2)}
    found = clamp_spikes(table(masses), spiky_loss(events))
    assert (found.ties, found.silent) == ((), 6)
    assert "nothing clamped" in found.summary()
    assert found.layers() == []


def test_one_row_and_constant_clamping_prove_nothing():
    events = some_events(5)
    one = {("a", "input"): torch.full((STEPS,), 0.5)}
    for statistics in (table(one, interval=STEPS), table(one)):
        found = clamp_spikes(statistics, spiky_loss(events))
        assert [(tie.p_value, tie.p_corrected) for tie in found.ties] == [(1.0, 1.0)]
        assert "beyond chance" in found.summary()


def test_unmeasured_windows_prove_nothing():
    events = torch.tensor([300])
    mass = noise(STEPS, seed=0).clamp(min=0)
    mass[280:310] = torch.nan
    rows = table({("a", "input"): torch.nan_to_num(mass)})
    at = rows.column_names.index("clamped_mass")
    rows = rows.set_column(at, "clamped_mass", pa.array(mass.float().numpy(), from_pandas=True))
    found = clamp_spikes(rows, spiky_loss(events))
    assert found.ties[0].p_corrected == 1.0
    assert math.isnan(found.ties[0].before)


def test_a_loss_that_breaks_off_in_nan_is_a_spike():
    loss = spiky_loss(torch.tensor([200]))
    loss.values[400:] = torch.nan
    found = clamp_spikes(table(unrelated_masses(1)), loss)
    assert [spike.step for spike in found.spikes] == [200, 401]
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_spikes_without_statistics_are_counted():
    events = some_events(6)
    found = clamp_spikes(table(unrelated_masses(1)), spiky_loss(events), begin=int(events[2]))
    assert (len(found.spikes), found.outside) == (4, 2)


def test_what_cannot_be_analysed_is_refused():
    loss, statistics = spiky_loss(some_events(3)), table(unrelated_masses(1))
    for options, message in (
        ({"statistic": "amax"}, "statistic must be one of clamped_mass, overflow_bits"),
        ({"correction": "bh"}, "correction must be one of max, holm"),
        ({"window": -1}, "window must be at least 0"),
        ({"begin": 601}, "must share steps after begin=601; the loss has steps 1 to 600"),
    ):
        with pytest.raises(ValueError, match=message):
            clamp_spikes(statistics, loss, **options)
    with pytest.raises(ValueError, match="must share steps"):
        clamp_spikes(statistics, Loss.of([1000, 1001], [1.0, 1.0]))
    with pytest.raises(ValueError, match="layer, clamped_mass missing"):
        clamp_spikes(statistics.drop_columns(["layer", "clamped_mass"]), loss)
    with pytest.raises(ValueError, match="must have rows of operands, got none"):
        clamp_spikes(COLUMNS.empty_table(), loss)
