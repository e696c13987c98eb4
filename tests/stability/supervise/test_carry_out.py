"""What one rank alone cannot answer, no rank can."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_fp.stability import BatchRing, Snapshots
from lightning_fp.stability.questions import Answer, Failed, Probed, ProbeStep
from lightning_fp.stability.supervise.carry_out import CarryOut


class OneOfTwo:
    """A loop of two ranks, of which the other one says always the same."""

    def __init__(self, other: bool) -> None:
        self.other = other

    def all(self, true: bool) -> bool:
        return true and self.other


@pytest.mark.parametrize(
    ("other", "answer"),
    [(True, Probed(error=None)), (False, Failed(error="it failed on another rank"))],
)
def test_a_question_fails_on_all_ranks_or_on_none(other: bool, answer: Answer) -> None:
    loop: Any = OneOfTwo(other)
    nothing: Any = lambda *_: None  # noqa: E731
    hands = CarryOut(
        loop, Snapshots(), BatchRing(), look_again=nothing, note=nothing, dry_run=False
    )
    assert hands.answer(ProbeStep(at=8)) == answer
