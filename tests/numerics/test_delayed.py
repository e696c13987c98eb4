"""Histories and the scales that follow from them."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp import DelayedScaling
from lightning_fp.numerics import advance_history, history_scale

amaxes = st.one_of(
    st.sampled_from([0.0, math.inf, math.nan]), st.floats(2.0**-20, 2.0**20, width=32)
)


@given(
    st.lists(amaxes, max_size=12),
    st.integers(1, 5),
    st.sampled_from(["max", "most_recent"]),
    st.integers(0, 3),
)
def test_as_a_queue_of_python_floats(
    seen: list[float], history_len: int, algorithm: Any, margin: int
) -> None:
    config = DelayedScaling(history_len=history_len, algorithm=algorithm, margin=margin)
    history = torch.zeros(history_len)
    queue: deque[float] = deque(maxlen=history_len)
    for amax in seen:
        history = advance_history(history, torch.tensor(amax))
        if math.isfinite(amax) and amax > 0:  # all else keeps the old scale
            queue.append(amax)
        scale = history_scale(history, torch.tensor(448.0), config).item()
        if not queue:
            assert scale == 0
            continue
        of = max(queue) if algorithm == "max" else queue[-1]
        assert scale == pytest.approx(448 / of / 2**margin, rel=1e-6)


def test_many_at_once_are_each_alone() -> None:
    history = torch.rand(3, 2, 4)
    amax = torch.tensor([[1.0, 0.0], [math.inf, 2.0], [math.nan, 3.0]])
    together = advance_history(history, amax)
    for i in range(3):
        for j in range(2):
            assert torch.equal(together[i, j], advance_history(history[i, j], amax[i, j]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history_len": 0}, "history_len must be at least 1, got 0"),
        ({"history_len": 1.5}, "history_len must be a whole number, got 1.5"),
        ({"algorithm": "mean"}, "algorithm must be 'max' or 'most_recent', got 'mean'"),
        ({"margin": -1}, "margin must be an integer of at least 0, got -1"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayedScaling(**options)
