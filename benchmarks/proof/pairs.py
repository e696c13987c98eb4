"""Healthy pairs: in runs in which nothing is wrong, the rules of a verdict are asked over and over.

Stretch after stretch of a run is one pair: the run's own steps, and the same batches in high
precision from the same weights. Both are what the watch's questions are answered with, and so are
forward gaps, controls and placebos where it asks for them. The loop is a plain one, so that a pair
takes a fraction of a second.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.proof.nets import BatchNormNet, Net, NoisyRegressor, TinyLlama, TinyViT
from lightning_fp.layers.format import NAMED_FORMATS
from lightning_fp.loop import PrecisionLoop
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.first_losses import learned, with_loss
from lightning_fp.stability.judge.conviction import Conclusion
from lightning_fp.stability.judge.evidence import Case
from lightning_fp.stability.judge.inquiry import answered, open_case
from lightning_fp.stability.questions import (
    Answer,
    Attribute,
    CompareLosses,
    HighReplayed,
    LossesCompared,
    Question,
    ReplayHigh,
    ReplayStep,
    ReplayStretch,
    StepReplayed,
    StretchReplayed,
    Survey,
    Surveyed,
)
from lightning_fp.stability.replay.placebo import perturb_
from lightning_fp.stability.respond.verdict import Anomaly, OneStep

NETS: dict[str, type[Net]] = {
    "regressor": NoisyRegressor,
    "batch-norm": BatchNormNet,
    "llama": TinyLlama,
    "vit": TinyViT,
}
FORMATS = "fp8-delayed", "fp8-dynamic", "fp8-rowwise", "mxfp8"
RATES = 3.0, 1.0, 0.3
"""Times the net's own learning rate."""

FIRST = 64
"""Steps before the first stretch: from there on a run is watched."""


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """One run, and what was said of it."""

    net: str
    format: str
    rate: float
    seed: int
    window: int
    """Steps of a stretch."""

    pairs: int
    convicted: list[str]
    """Why precision was blamed, by pair in which it was."""

    findings: dict[str, int]
    """How many pairs came to what."""

    seconds: float
    """Processor time."""


@dataclass
class Arm:
    """A net in training, and its copies of a time."""

    net: Net
    optimizer: torch.optim.Optimizer
    loop: PrecisionLoop | None

    @classmethod
    def of(cls, kind: type[Net], seed: int, rate: float, format: str | None) -> Arm:
        net = kind(seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate * kind.rate, betas=(0.9, 0.95))
        loop = None
        if format is not None:
            loop = PrecisionLoop(
                net, optimizer, format, layers={"*": format}, base="32-true", fallback=False,
                monitor=False, progress=False,
            )  # fmt: skip
        return cls(net, optimizer, loop)

    def train(self, batches: Sequence[Any]) -> list[float]:
        """Losses, step by step."""
        return [float(self._step(batch)) for batch in batches]

    def _step(self, batch: Any) -> Tensor:
        if self.loop is not None:
            return self.loop.step(self.net.loss, batch)
        self.optimizer.zero_grad()
        loss = self.net.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> tuple[Any, Any, Any]:
        own = None if self.loop is None else self.loop.state_dict()
        return copy.deepcopy((self.net.state_dict(), self.optimizer.state_dict(), own))

    def load(self, state: tuple[Any, Any, Any]) -> None:
        weights, optimizer, own = copy.deepcopy(state)
        self.net.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        if self.loop is not None:
            self.loop.load_state_dict(own)

    @torch.no_grad()
    def losses(self, batches: Sequence[Any]) -> tuple[float, ...]:
        """Forward, on the weights of now; running means stay."""
        before = copy.deepcopy(dict(self.net.named_buffers()))
        found = tuple(float(self.net.loss(batch)) for batch in batches)
        for name, buffer in self.net.named_buffers():
            buffer.copy_(before[name])
        return found


class Stretch:
    """Some steps of a run, and the answers to what is asked about them.

    Gradients are not compared: in a healthy run they convict of nothing.
    """

    def __init__(self, run: Arm, high: Arm, fresh: Any, batches: Sequence[Any]) -> None:
        self.run, self.high, self.fresh, self.batches = run, high, fresh, batches
        self.before = run.state()
        self.record = run.train(batches)
        self.at = 0

    def answer(self, question: Question[Any], seen: Sequence[Any]) -> Answer:
        """What it comes to.

        Args:
            question: of the watch.
            seen: all batches so far.
        """
        match question:
            case Survey():
                formats = {
                    name: row.format.name
                    for name, row in self.run.loop.precision_map.layers.items()
                }
                return Surveyed(
                    low=formats,
                    high=NAMED_FORMATS["fp32"],
                    start=question.at - len(self.record),
                    losses=tuple(self.record),
                    steps=tuple(range(question.at - len(self.record), question.at)),
                )
            case CompareLosses(count=count):
                return self._compare(seen[-count:])
            case ReplayStep():
                both = self._compare(seen[-1:])
                return StepReplayed(
                    seen=OneStep(
                        loss=both.losses[0], high_loss=both.high_losses[0], grad_norm_ratio=1.0,
                        finite=True, high_finite=True, grad_error=0.0, worst_error=0.0,
                        floor=0.0,
                    )
                )  # fmt: skip
            case ReplayHigh(batch=which):
                at = 0 if which == "first" else -1
                loss = self._compare([self.batches[at]]).high_losses[0]
                return HighReplayed(loss=loss, finite=True, loss_then=self.record[at])
            case ReplayStretch(precision=precision, steps=steps):
                batches = self.batches[:steps]
                arm = self.high if precision == "high" else self.fresh()
                arm.load(self.before)
                if precision == "placebo":
                    perturb_(arm.net.parameters(), seed=question.start)
                losses = tuple(arm.train(batches))
                return StretchReplayed(done=True, losses=losses, made=len(losses))
            case _:
                raise TypeError(f"no answer to a {type(question).__name__}")

    def _compare(self, batches: Sequence[Any]) -> LossesCompared:
        with self.run.loop.as_trained():
            low = self.run.losses(batches)
        self.high.net.load_state_dict(self.run.net.state_dict())
        return LossesCompared(losses=low, high_losses=self.high.losses(batches))


def healthy_run(
    net: str, format: str, rate: float, seed: int, *, pairs: int, window: int
) -> Healthy:
    """Train, and ask about every stretch; every other time as if the loss had risen.

    Args:
        net: a name of `NETS`.
        format: of all layers.
        rate: times the net's own learning rate.
        seed: of weights and batches.
        pairs: stretches.
        window: steps of one.
    """
    began = time.process_time()
    kind = NETS[net]
    batches = kind.batches(FIRST + window * pairs, seed)
    run = Arm.of(kind, seed, rate, format)
    high = Arm.of(kind, seed, rate, None)
    detector = DivergenceDetector()
    state, first = detector.init(), tuple[float, ...]()
    losses, convicted, findings = run.train(batches[:FIRST]), [], {}
    for pair in range(pairs):
        end = FIRST + window * (pair + 1)
        stretch = Stretch(
            run, high, lambda: Arm.of(kind, seed, rate, format), batches[end - window : end]
        )
        for loss in [*losses, *stretch.record]:
            first = with_loss(first, loss)
            state, decision = detector.step(state, loss=loss)
        losses = []
        level = decision.baseline
        anomaly = Anomaly(baseline=level, noise=decision.noise, learned=learned(first, level))
        case = Case(step=end, onset=end - window + 1, anomaly=anomaly, risen=pair % 2 == 1)
        finding, why = verdict(case, stretch, batches[:end])
        findings[finding] = findings.get(finding, 0) + 1
        convicted += [f"pair {pair}: {why}"] if finding == "precision" else []
    return Healthy(
        net=net,
        format=format,
        rate=rate,
        seed=seed,
        window=window,
        pairs=pairs,
        convicted=convicted,
        findings=findings,
        seconds=round(time.process_time() - began, 2),
    )


def verdict(case: Case, stretch: Stretch, seen: Sequence[Any]) -> tuple[str, str]:
    """What the watch's rules come to, and why."""
    said: Any = open_case(case)
    while not isinstance(said, Conclusion):
        if isinstance(said.question, Attribute):  # who is to blame is asked after a conviction
            return "precision", _why(said.evidence.known)
        said = answered(said, stretch.answer(said.question, seen))
    return said.finding, ""


def _why(known: Any) -> str:
    return "; ".join(f"{q}: {a}" for q, a in known.items() if not isinstance(q, Survey))[:2000]
