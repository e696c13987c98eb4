"""Which steps are sampled."""

from __future__ import annotations

import pytest

from lightning_fp.telemetry.casts.sampling import SampledSteps


def taken(steps: SampledSteps, *numbers: int) -> list[int]:
    return [number for number in numbers if steps.take(number)]


@pytest.mark.parametrize("window", [1, 4, 16])
def test_one_in_every_window(window: int) -> None:
    found = taken(SampledSteps(window, seed=0), *range(window * 50))
    assert [step // window for step in found] == list(range(50))


def test_places_differ_and_follow_from_the_seed() -> None:
    found, again, other = (taken(SampledSteps(16, seed), *range(1600)) for seed in (0, 0, 1))
    assert found == again != other
    assert len({step % 16 for step in found}) > 8


def test_a_resumed_run_samples_what_the_whole_run_would_have() -> None:
    whole = taken(SampledSteps(16, 0), *range(320))
    for stop in range(0, 320, 7):
        first = SampledSteps(16, 0)
        before = taken(first, *range(stop))
        second = SampledSteps(16, 0)
        second.last = first.last
        assert before + taken(second, *range(stop, 320)) == whole


def test_steps_that_jump() -> None:
    """Manual optimization with two optimizers: two optimizer steps per batch."""
    found = taken(SampledSteps(4, 0), *range(0, 200, 3))
    assert [step // 4 for step in found] == sorted({step // 4 for step in found})
    assert len(found) > 30


def test_a_smaller_step_begins_anew() -> None:
    steps = SampledSteps(4, 0)
    whole = taken(steps, *range(40))
    assert taken(steps, *range(40)) == whole


def test_one_out_of_turn_moves_none_of_the_others() -> None:
    whole = taken(SampledSteps(16, 0), *range(160))
    steps, found = SampledSteps(16, 0), []
    for step in range(160):
        found += taken(steps, step)  # the first micro-batch of the step
        steps.asked |= step in (3, 70, 71)
        if step not in found:
            assert not steps.take(step)  # the second is not the next step
    assert found == sorted({*whole, 4, 71, 72})
