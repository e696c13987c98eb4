"""What the divergence detector says about a step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Kind = Literal["ok", "skip", "suspect", "diverged"]


class Cause(Enum):
    """Why; the values are the sentences that users read, each with what to do."""

    HEALTHY = "nothing unusual"
    LEARNING = (
        "the run's usual level and noise are still being learned: until then only inf and NaN count"
    )
    NOT_FINITE = "the loss, a gradient or an update is inf or NaN: do not apply this step"
    OFTEN_NOT_FINITE = (
        "the loss, a gradient or an update has been inf or NaN for several steps in a row: replay a"
        " batch in high precision, and look at the data"
    )
    STAYS_NOT_FINITE = (
        "the loss, a gradient or an update stays inf or NaN: go back to a state before this began"
    )
    RAISED = "the loss is above its usual level: replay recent batches in high precision"
    DRIFT = (
        "the loss drifts upwards by more than its noise explains: replay recent batches in high"
        " precision"
    )
    OUTLIERS = (
        "most of the last losses are far above the usual level: replay recent batches in high"
        " precision"
    )
    GRADIENT = (
        "most of the last gradient norms are far above the usual level: watch the loss, replay a"
        " batch in high precision"
    )
    UPDATE = (
        "most of the last updates are far larger than usual for their parameters: watch the loss,"
        " replay a batch in high precision"
    )
    LASTING = "the loss rose and does not come back: go back to a state before the rise"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What the detector says about one step."""

    kind: Kind
    """`"ok"`; `"skip"`: do not apply this step; `"suspect"`: something is wrong and may yet heal;
    `"diverged"`: it does not heal by itself. The last two hold at every step until it is over or
    the detector is told what was done about it."""

    cause: Cause

    skip: bool = False
    """Do not apply this step's update, whatever else is the matter: something in it is not
    finite."""

    onset: int | None = None
    """Steps ago that the anomaly began, 0 for this one; a rollback goes to before that. None while
    there is none."""

    loss: float | None = None
    """As given."""

    baseline: float | None = None
    """The usual loss; that of before it during an anomaly. None until it is known."""

    noise: float | None = None
    """Robust standard deviation of the loss from step to step; None until it is known."""

    @property
    def score(self) -> float | None:
        """How many standard deviations the loss is above the baseline."""
        if self.loss is None or self.baseline is None or self.noise is None:
            return None
        return (self.loss - self.baseline) / self.noise

    @property
    def reason(self) -> str:
        """A sentence with the figures."""
        sentence = self.cause.value
        if self.onset is not None:
            ago = "at this step" if self.onset == 0 else f"{self.onset} steps ago"
            sentence += f" (began {ago}; loss {_number(self.loss)}"
            if self.baseline is not None:
                sentence += f", usual {self.baseline:.4g} ± {self.noise:.2g}"
            sentence += ")"
        return sentence


def _number(value: float | None) -> str:
    return "not given" if value is None else f"{value:.4g}"
