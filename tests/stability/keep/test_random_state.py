"""The generators' state goes through a checkpoint and draws the same numbers again."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightning_fp.stability import RandomState

GENERATORS = ("MT19937", "PCG64", "Philox", "SFC64")


@pytest.fixture(params=GENERATORS)
def bit_generator(request: pytest.FixtureRequest) -> Iterator[str]:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(getattr(np.random, request.param)(7))
    yield request.param
    np.random.set_bit_generator(before)


def draw() -> list[float]:
    gauss = [random.gauss(0, 1), float(np.random.standard_normal())]  # both draw two at a time
    return [*gauss, random.random(), float(np.random.rand()), *torch.randn(3).tolist()]


def through_checkpoint(state: RandomState) -> RandomState:
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    return RandomState.from_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("drawn", [0, 1, 5, 700])
def test_same_numbers(drawn: int, bit_generator: str) -> None:
    for _ in range(drawn):
        draw()
    state = RandomState.capture()
    expected = [draw() for _ in range(400)]
    for again in (state, through_checkpoint(state), through_checkpoint(through_checkpoint(state))):
        again.restore()
        assert [draw() for _ in range(400)] == expected


def test_captured_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    state = through_checkpoint(RandomState.capture())
    assert state.numpy is None
    expected = torch.rand(2)
    state.restore()
    assert torch.equal(torch.rand(2), expected)


def test_bytes() -> None:
    random.seed(0)
    state = RandomState.capture()
    words = state.python[1]
    size = sys.getsizeof(words) + sum(map(sys.getsizeof, words))
    size += state.numpy["state"]["key"].nbytes + state.torch.numel()
    assert state.nbytes == pytest.approx(size, rel=0.05)
