"""Steps with unusual casts."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp.stability.detect.cast_trigger import CastJump, CastState, CastTrigger

LAYERS = 5


def usual(step: int) -> Tensor:
    """Healthy amax: about a bit up and down."""
    generator = torch.Generator().manual_seed(step)
    return 2 ** (2 + 0.3 * torch.randn(LAYERS, 2, generator=generator))


def with_jump(step: int, bits: float, layer: int = 2, operand: int = 0) -> Tensor:
    amax = usual(step)
    amax[layer, operand] = 2 ** (2 + bits)
    return amax


def warm(trigger: CastTrigger, steps: int = 40) -> CastState:
    state = trigger.init(LAYERS)
    for step in range(steps):
        state, jumps = trigger.step(state, step, usual(step))
        assert jumps == []
    return state


def test_the_first_bad_batch_is_caught() -> None:
    trigger = CastTrigger()
    _, jumps = trigger.step(warm(trigger), 40, with_jump(40, 6))
    assert [(jump.layer, jump.operand) for jump in jumps] == [(2, "input")]
    assert jumps[0].bits == pytest.approx(6, abs=0.3)


def test_the_largest_jump_comes_first() -> None:
    trigger = CastTrigger()
    amax = with_jump(40, 5)
    amax[4, 1] = math.inf
    amax[0, 0] = 2.0**20
    _, jumps = trigger.step(warm(trigger), 40, amax)
    assert [(j.layer, j.operand) for j in jumps] == [(4, "weight"), (0, "input"), (2, "input")]
    assert jumps[0].bits == math.inf


def test_nothing_is_said_before_the_window_is_full() -> None:
    trigger = CastTrigger()
    assert trigger.step(warm(trigger, 31), 31, with_jump(31, 8))[1] == []
    assert trigger.step(warm(trigger, 32), 32, with_jump(32, 8))[1]


def test_what_was_not_seen_neither_jumps_nor_counts() -> None:
    trigger = CastTrigger()
    state = trigger.init(2)
    for step in range(40):
        amax = torch.tensor([[4.0, 0.0], [math.nan, 4.0 if step % 2 else 0.0]])
        state, jumps = trigger.step(state, step, amax)
        assert jumps == []
    _, jumps = trigger.step(state, 40, torch.tensor([[4.0, 64.0], [64.0, 64.0]]))
    assert [(jump.layer, jump.operand) for jump in jumps] == [(1, "weight")]


def reported(bits: list[float]) -> list[int]:
    """The steps that are reported if the same operand jumps so far, step after step."""
    trigger = CastTrigger()
    state, found = warm(trigger), list[int]()
    for index, far in enumerate(bits):
        state, jumps = trigger.step(state, 40 + index, with_jump(40 + index, far))
        found += [index] * bool(jumps)
    return found


def test_a_jump_that_comes_again_is_reported_ever_more_rarely() -> None:
    every = [6.0 if index % 2 == 0 else 0.0 for index in range(64)]
    assert reported(every) == [0, 4, 12, 28, 60]


def test_a_higher_one_is_reported_at_once() -> None:
    assert reported([5, 5, 5.5, 6.6, 6.6, 9]) == [0, 3, 5]


def test_a_new_level_is_soon_the_usual_one() -> None:
    assert max(reported([5.0] * 200)) < 17  # half of the window


def test_state_in_the_middle() -> None:
    trigger = CastTrigger()
    state, _ = trigger.step(warm(trigger), 40, with_jump(40, 6))
    file = io.BytesIO()
    torch.save(trigger.state_dict(state), file)
    file.seek(0)
    loaded = trigger.load_state_dict(torch.load(file, weights_only=True))
    for step in range(41, 60):
        amax = with_jump(step, 6)
        state, jumps = trigger.step(state, step, amax)
        loaded, again = trigger.step(loaded, step, amax)
        assert jumps == again


@given(st.integers(0, 10), st.floats(0.1, 8), st.floats(-20, 20))
def test_only_the_distance_counts(seed: int, bits: float, scale: float) -> None:
    """A layer whose values are all larger by a factor jumps at the same steps."""
    trigger = CastTrigger(window=4)
    found: list[list[CastJump]] = []
    for factor in (1.0, 2.0**scale):
        state = trigger.init(LAYERS)
        for step in range(4):
            state, _ = trigger.step(state, step, factor * usual(seed + step).clamp(4, 4))
        found.append(trigger.step(state, 4, factor * with_jump(seed, bits).clamp(min=4))[1])
    assert [j.layer for j in found[0]] == [j.layer for j in found[1]] or abs(bits - 3) < 1e-3


@pytest.mark.parametrize("wrong", [{"bits": 0.0}, {"bits": -1.0}, {"window": 1}])
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name} must be"):
        CastTrigger(**wrong)  # pyright: ignore[reportArgumentType]
