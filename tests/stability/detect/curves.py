"""Loss curves, healthy and not: one that was recorded, others made up, and faults to put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from lightning_fp.stability import Decision, DetectorState, DivergenceDetector

Array = np.ndarray

RECORDED = (
    Path(__file__).parents[4] / "shared" / "data" / "llmc_gpt2_124m_fineweb_loss_gradnorm.csv"
)
"""A real GPT-2 124M run; the project does not contain it."""

RECORDED_NOISE = 0.0385
"""Robust standard deviation of its loss around a running mean; 0.043 without the robust."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run hands the detector, step by step."""

    name: str
    loss: Array
    noise: Array
    """Standard deviation of the loss at each step."""
    grad_norm: Array | None = None
    lr: Array | None = None

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something added to the loss from its onset on."""

    name: str
    rise: Callable[[Array], Array]
    """Of the steps since the onset, in units of the noise; NaN is a loss that is NaN."""
    heals: bool = False


def _until(steps: int, rise: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda k: np.where(k < steps, rise(k), 0.0)


FAULTS = (
    Fault(name="blow-up", rise=lambda k: np.minimum(0.5 * np.exp(np.minimum(k, 30) / 3), 150)),
    Fault(name="slow drift", rise=lambda k: 0.03 * k),
    Fault(name="step +2", rise=lambda k: 2.0 + 0 * k),
    Fault(name="step +3.5", rise=lambda k: 3.5 + 0 * k),
    Fault(
        name="BLOOM-like spike",
        rise=lambda k: np.interp(k, [0, 8, 15, 40], [0, 12, 12, 0]),
        heals=True,
    ),
    Fault(name="NaN burst", rise=_until(8, lambda k: np.nan + k), heals=True),
)

HEALING = (
    *(fault for fault in FAULTS if fault.heals),
    Fault(name="5 steps", rise=_until(5, lambda k: 10.0 + 0 * k), heals=True),
    Fault(
        name="30 steps", rise=_until(30, lambda k: np.interp(k, [0, 3, 30], [4, 15, 2])), heals=True
    ),
    Fault(name="40 steps, flat", rise=_until(40, lambda k: 6.0 + 0 * k), heals=True),
)


def with_fault(curve: Curve, fault: Fault, onset: int, steps: int = 400) -> Curve:
    """The curve with a fault, up to some steps after its onset."""
    k = np.arange(min(steps, len(curve) - onset))
    loss = curve.loss[: onset + len(k)].copy()
    loss[onset:] += fault.rise(k) * curve.noise[onset]
    return replace(curve, loss=loss)


def recorded() -> Curve:
    """The recorded run; skips the test where it is not to be had."""
    if not RECORDED.is_file():
        pytest.skip(f"needs {RECORDED}")
    columns = np.genfromtxt(RECORDED, delimiter=",", names=True)
    return Curve(
        name="recorded",
        loss=columns["loss"],
        noise=np.full(len(columns), RECORDED_NOISE),
        grad_norm=columns["grad_norm"],
        lr=columns["lr"],
    )


def _autocorrelated(rng: np.random.Generator, steps: int, memory: float) -> Array:
    """Standard normal, each value like the one before."""
    values = rng.standard_normal(steps)
    for i in range(1, steps):
        values[i] = memory * values[i - 1] + np.sqrt(1 - memory**2) * values[i]
    return values


NOISES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy-tailed": lambda rng, n: rng.standard_t(4, n) / np.sqrt(2),
    "autocorrelated": lambda rng, n: _autocorrelated(rng, n, rng.uniform(0.1, 0.4)),
    "growing": lambda rng, n: rng.standard_normal(n) * np.linspace(1, rng.uniform(1.5, 2.5), n),
    "shrinking": lambda rng, n: rng.standard_normal(n) * np.linspace(2, 1, n),
    "skewed": lambda rng, n: (rng.gamma(4, 1, n) - 4) / 2,
    "waves": lambda rng, n: rng.standard_normal(n) + 0.3 * _autocorrelated(rng, n, 1 - 1 / 60),
}
"""Noise of about unit size. "waves": data in an order that makes whole stretches harder."""

SCHEDULES = ("constant", "cosine", "cooldown", "restarts", "rewarmed")


def healthy(seed: int, noise: str, schedule: str, steps: int = 12_000) -> Curve:
    """A run as they are: a power law, noise, a schedule that shows, small upsets that heal."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, steps + 1)
    size = np.exp(rng.uniform(np.log(0.03), np.log(0.25)))
    end = rng.uniform(2.2, 3.3)
    loss = end + (11 - end) * (1 + t / rng.uniform(5, 40)) ** -rng.uniform(0.25, 0.6)
    loss += size * NOISES[noise](rng, steps)
    lr = np.minimum(1, t / max(1, rng.choice([0, 100, 256, 700])))
    if schedule == "cosine":
        lr = lr * (0.55 + 0.45 * np.cos(np.pi * t / steps))
    elif schedule == "cooldown":
        part = np.clip((t / steps - 0.7) / 0.3, 0, 1)
        lr, loss = lr * (1 - part), loss - 0.15 * part
    elif schedule == "restarts":  # the loss rises again with the learning rate
        part = (t % (steps // 4)) / (steps // 4)
        lr = lr * (0.525 + 0.475 * np.cos(np.pi * part))
        loss -= 0.12 * (0.5 - 0.5 * np.cos(np.pi * part)) * (t > steps // 8)
    elif schedule == "rewarmed":
        down = np.clip((t / steps - 0.5) / 0.1, 0, 1)
        up = np.clip((t - 0.6 * steps) / 200, 0, 1)
        lr = lr * (1 - 0.95 * down + 0.95 * up)
        loss -= 0.12 * (down - np.clip((t - 0.6 * steps) / 250, 0, 1))
    for at in rng.integers(200, steps, 2):  # single bad batches
        loss[at] += size * rng.uniform(5, 30)
    for at in rng.integers(steps // 10, steps, 2):  # other data, a little harder or easier
        loss[at:] += size * rng.uniform(-0.5, 0.3)
    spread = {
        "growing": np.linspace(1, 2, steps),
        "shrinking": np.linspace(2, 1, steps),
    }.get(noise, np.ones(steps))
    return Curve(name=f"{noise}, {schedule}", loss=loss, noise=size * spread, lr=1e-3 * lr)


def short_run(seed: int, steps: int = 400) -> Curve:
    """A tiny model that learns fast: the loss falls by many times its noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    loss = 2.5 + 3 * np.exp(-t / rng.uniform(40, 150)) + 0.3 * np.exp(-t / 8)
    lr = 1e-3 * np.minimum(1, (t + 1) / rng.integers(1, 60))
    return Curve(
        name="short",
        loss=loss + 0.05 * rng.standard_normal(steps),
        noise=np.full(steps, 0.05),
        lr=lr,
    )


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a detector said about a curve."""

    decisions: list[Decision] = field(default_factory=list)
    states: list[DetectorState] = field(default_factory=list)
    """Before each step."""

    def _beginnings(self, kinds: tuple[str, ...]) -> list[int]:
        found = [decision.kind in kinds for decision in self.decisions]
        return [i for i, now in enumerate(found) if now and not (i and found[i - 1])]

    @property
    def suspicions(self) -> list[int]:
        """Where they began, of those that turned into a verdict too."""
        return self._beginnings(("suspect", "diverged"))

    @property
    def verdicts(self) -> list[int]:
        """Where the detector began to say that the run diverged."""
        return self._beginnings(("diverged",))


def watch(
    curve: Curve,
    detector: DivergenceDetector | None = None,
    *,
    state: DetectorState | None = None,
    start: int = 0,
    loss_only: bool = False,
) -> Watched:
    """Show the detector the curve, from a step and a state on."""
    detector = detector or DivergenceDetector()
    state = detector.init() if state is None else state
    watched = Watched()
    for i in range(start, len(curve)):
        watched.states.append(state)
        grad_norm = None if loss_only or curve.grad_norm is None else float(curve.grad_norm[i])
        lr = None if curve.lr is None else float(curve.lr[i])
        state, decision = detector.step(
            state, loss=float(curve.loss[i]), grad_norm=grad_norm, lr=lr
        )
        watched.decisions.append(decision)
    return watched
