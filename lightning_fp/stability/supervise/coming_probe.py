"""A probe of which the run makes half: the coming batch in high precision, and then its own step.

A probe on a batch that has been costs two steps, one of them in the formats of the run. The coming
step is made in these formats anyway: so its batch is run in high precision before it, on the same
weights and from the same random state, and the gradients that its backward leaves are compared.
That takes one rank, one micro-batch and no compiled code; elsewhere both sides are replays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_fp.stability.answers import Answers
from lightning_fp.stability.happenings import Answered
from lightning_fp.stability.keep.batch_ring import BatchRing, MicroBatch, RecordedStep
from lightning_fp.stability.questions import Answer, Failed, Probed, ProbeStep
from lightning_fp.stability.replay.one_step import Replay, compare
from lightning_fp.stability.respond.attribution import gradient_error
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a probe found, but for the loss of the step itself, which arrives later."""

    at: int
    error: float | None = None
    high_loss: float | None = None
    norm: float | None = None
    failed: str | None = None
    """What the replay raised."""


class ComingProbe:
    """Is asked between two steps, and answers between the next two.

    Args:
        loop: what trains.
        answers: runs the replay, where the rehearsal lets it.
        ring: the recorded steps, with their losses.
    """

    def __init__(self, loop: SupervisedLoop, answers: Answers, ring: BatchRing) -> None:
        self._loop, self._answers, self._ring = loop, answers, ring
        self._asked: int | None = None
        self._high: Replay | None = None
        self._found: _Found | None = None

    @property
    def waits(self) -> bool:
        """Whether an answer is still to come."""
        return self._asked is not None or self._found is not None

    def takes(self, question: ProbeStep) -> bool:
        """Whether the coming step is going to answer.

        Args:
            question: asked again it changes nothing.
        """
        if self._found is not None:
            return question.coming
        here = question.coming and self._answers.replayable and self._loop.own_gradients
        self._asked = question.at if here else None
        return here

    def before_forward(self, batch: MicroBatch) -> None:
        """Run the batch of the coming step in high precision.

        Args:
            batch: nobody has seen anything of it.
        """
        at, self._asked, self._high = self._asked, None, None
        if at is None:
            return
        step = RecordedStep(step=at, micro_batches=[batch])
        high = self._answers.in_high_precision(step)
        failed = high.error if isinstance(high, Failed) else None
        self._found = _Found(at=at, failed=failed)
        self._high = None if isinstance(high, Failed) else high

    def after_backward(self) -> None:
        """Compare the step's gradients, before anybody clips them or an optimizer uses them."""
        high, found, self._high = self._high, self._found, None
        if high is None or found is None:
            return
        model = self._loop.model
        current = Replay(loss=high.loss, gradients=[p.grad for p in model.parameters()])
        seen = compare(current, high, model, self._loop.table)
        if seen.finite:
            self._found = _Found(
                at=found.at,
                error=gradient_error(seen),
                high_loss=seen.losses[1],
                norm=seen.all.norm,
            )

    def take(self, step: int) -> Answered | None:
        """Between two steps: the answer, once the step's loss has arrived.

        Args:
            step: steps so far.
        """
        found = self._found
        if found is None:
            return None
        made = self._ring.find(found.at)
        if made is not None and made.loss is None:
            return None
        self._found = None
        losses = None
        if made is not None and made.loss is not None and found.high_loss is not None:
            losses = made.loss, found.high_loss
        replays = 0 if found.norm is None else 1
        answer: Answer = Probed(
            error=found.error, losses=losses, norm=found.norm, of_step=True, replays=replays
        )
        if found.failed is not None:
            answer = Failed(error=found.failed)
        return Answered(question=ProbeStep(at=step, coming=True), answer=answer)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """What was found and not told yet, as plain numbers."""
        return None if self._found is None else asdict(self._found)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """See `state_dict`."""
        self._found = None if state is None else _Found(**state)
