"""Early warning: the training-inference mismatch has left its usual level.

In reinforcement learning the mismatch grows before the run collapses (arXiv 2510.26788), while loss
and reward still look healthy. What is usual differs between models, engines and formats by orders
of magnitude, so each run is compared with its own beginning. This module says that it grows; what
to do about it, and whether precision is the reason, it leaves to others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.stability.detect.decision import Decision
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.detector_state import DetectorState
from lightning_fp.state_version import check_version

VERSION = 1
"""Of a state's plain form."""

LEAST_ABS_DIFF = 1e-7
"""Mean difference of log-probabilities below which both sides are taken for equal: what float32
rounds a log-probability of 1 by."""

LEAST_K3 = LEAST_ABS_DIFF**2 / 2
"""The same of k3, which is half the square of small differences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchState:
    """All that the detector remembers: never changed, each step makes a new one."""

    abs_diff: DetectorState = field(default_factory=DetectorState)
    """Of the logarithm of the mean absolute log-ratio."""

    k3: DetectorState = field(default_factory=DetectorState)
    """Of the logarithm of the k3 estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchDecision:
    """What the detector says about one step."""

    raised: bool
    """Whether the mismatch is above its usual level; holds until it is back, or for so long that
    this has become usual."""

    began: bool = False
    """Whether it is noticed with this step: the moment to say so."""

    signal: str = ""
    """The metric that is raised, by the name that `TrainingInferenceMismatch` gives it."""

    value: float | None = None
    """That metric at this step; None if it was not given."""

    usual: float | None = None
    """What it usually is; what it was before while it is raised. None until it is known."""

    onset: int | None = None
    """Steps ago that the rise began, 0 for this one; None while there is none."""

    @property
    def factor(self) -> float | None:
        """How many times its usual level the metric is."""
        if self.value is None or not self.usual:
            return None
        return self.value / self.usual

    @property
    def reason(self) -> str:
        """A sentence with the figures."""
        if not self.raised:
            return "training and rollout are as far apart as usual"
        ago = "at this step" if not self.onset else f"{self.onset} steps ago"
        figures = f"began {ago}"
        if self.value is not None and self.factor is not None:
            figures += f"; {self.signal} {self.value:.2g}, {self.factor:.1f} times the usual"
        return f"training and rollout drift apart ({figures})"


@checked
@dataclass(frozen=True, kw_only=True)
class MismatchDetector:
    """Watches the mean absolute log-ratio and k3 for a rise that lasts.

    Both go through a `DivergenceDetector`, as logarithms, because factors count and because its
    CUSUM measures in units of the noise. Its baselines follow a falling signal at once and a rising
    one slowly, which suits a mismatch that shrinks while the policy gets surer. Thresholds are
    higher than for losses: a rise is noticed at 1.5 to 3 times the usual, depending on the noise,
    and noise that is alike for a dozen steps is not. Neither metric can cancel, whereas the plain
    estimate of the divergence (k1) changes its sign, and no warning is made of it.

    >>> detector = MismatchDetector()
    >>> state = detector.init()
    >>> for step in range(400):
    ...     r = 1e-3 * (1 + 0.1 * (-1) ** step) * math.exp(max(0, step - 300) / 50)
    ...     state, decision = detector.step(state, abs_diff=r, k3=r * r)
    ...     if decision.began:
    ...         print(step, f"{decision.signal}, {decision.factor:.1f} times the usual")
    331 logprob_abs_diff_mean, 1.7 times the usual
    """

    armed: int = 32
    """Steps in which the usual level is learned; no warning comes before."""

    cusum: float = 12.0
    """Warns when the sum of what scores (logarithms above the usual one, in standard deviations of
    their noise) exceed `slack` by is above this, as in `DivergenceDetector`."""

    slack: float = 1.5
    """Standard deviations that add nothing to the sum."""

    drift: float = 3.0
    """Warns when the average of the last steps is so many standard deviations above the lowest."""

    least_noise: float = 0.2
    """The noise of the logarithm of the mean absolute log-ratio is taken for at least this, so that
    only rises to `exp(0.2 * slack)` = 1.35 times the usual count. Twice as much for k3, which goes
    with the square."""

    def __post_init__(self) -> None:
        if not self.least_noise > 0:
            raise ValueError(f"least_noise must be greater than 0, got {self.least_noise}")
        _ = self._detectors  # refuses the other options

    @cached_property
    def _detectors(self) -> tuple[DivergenceDetector, DivergenceDetector]:
        return self._detector(self.least_noise), self._detector(2 * self.least_noise)

    def _detector(self, least_noise: float) -> DivergenceDetector:
        return DivergenceDetector(
            armed=self.armed,
            cusum=self.cusum,
            slack=self.slack,
            drift=self.drift,
            least_noise=least_noise,
        )

    def init(self) -> MismatchState:
        """The state before the first step."""
        return MismatchState()

    def step(
        self, state: MismatchState, *, abs_diff: float | None = None, k3: float | None = None
    ) -> tuple[MismatchState, MismatchDecision]:
        """Judge one step.

        Args:
            state: of the step before; it stays as it is.
            abs_diff: mean of abs(r) over the step's tokens, with r = log pi_train - log mu_rollout;
                `logprob_abs_diff_mean` of `TrainingInferenceMismatch`. None and what is not finite
                say nothing.
            k3: mean of exp(r) - 1 - r; `k3_kl`.

        Returns:
            The state for the next step, and the decision.
        """
        before = _raised(state)
        of_abs_diff, of_k3 = self._detectors
        first, decided_abs_diff = _judge(of_abs_diff, state.abs_diff, abs_diff, LEAST_ABS_DIFF)
        second, decided_k3 = _judge(of_k3, state.k3, k3, LEAST_K3)
        after = MismatchState(abs_diff=first, k3=second)
        raised = _raised(after)
        # The mean of absolute values has lighter tails: its level is the better known one.
        of_which = second if first.incident is None and second.incident is not None else first
        name, value, decided = (
            ("k3_kl", k3, decided_k3)
            if of_which is second
            else ("logprob_abs_diff_mean", abs_diff, decided_abs_diff)
        )
        usual = None if decided is None else decided.baseline
        decision = MismatchDecision(
            raised=raised,
            began=raised and not before,
            signal=name,
            value=value,
            usual=None if usual is None else math.exp(usual),
            onset=None if of_which.incident is None else of_which.incident.onset,
        )
        return after, decision

    def precision_changed(self, state: MismatchState) -> MismatchState:
        """After formats have changed on either side: what was usual before stays in force."""
        of_abs_diff, of_k3 = self._detectors
        return MismatchState(
            abs_diff=of_abs_diff.precision_changed(state.abs_diff),
            k3=of_k3.precision_changed(state.k3),
        )

    def state_dict(self, state: MismatchState) -> dict[str, Any]:
        """As plain numbers, strings, lists and dicts, for a checkpoint."""
        of_abs_diff, of_k3 = self._detectors
        return {
            "version": VERSION,
            "abs_diff": of_abs_diff.state_dict(state.abs_diff),
            "k3": of_k3.state_dict(state.k3),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> MismatchState:
        """The state that `state_dict` was made of; continues bit for bit.

        Raises:
            ValueError: if it is of another version, or no detector's.
        """
        of, do = "the mismatch detector's state", "start with detector.init()"
        state_dict = check_version(state_dict, VERSION, of, do=do)
        of_abs_diff, of_k3 = self._detectors
        return MismatchState(
            abs_diff=of_abs_diff.load_state_dict(state_dict["abs_diff"]),
            k3=of_k3.load_state_dict(state_dict["k3"]),
        )


def _judge(
    detector: DivergenceDetector, state: DetectorState, value: float | None, least: float
) -> tuple[DetectorState, Decision | None]:
    """One signal; without a value its state stays as it is."""
    if value is None or not math.isfinite(value):
        return state, None
    # In float32 both sides may agree exactly, and zero has no logarithm.
    return detector.step(state, loss=math.log(max(value, least)))


def _raised(state: MismatchState) -> bool:
    return state.abs_diff.incident is not None or state.k3.incident is not None
