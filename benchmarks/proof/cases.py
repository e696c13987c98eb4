"""The cases: a net, what goes wrong with it, and the format that it is trained in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L

from benchmarks.proof import innocents
from benchmarks.proof.faults import AlignedPair, HotChannels, HotRow, HugeValue
from benchmarks.proof.nets import (
    BatchNormNet,
    Net,
    NoisyRegressor,
    Regressor,
    TinyLlama,
    TinyViT,
)
from lightning_fp.demo import faults as demo
from lightning_fp.demo.faults import run as demo_run
from lightning_fp.layers import LinearFormat

START, STEPS = 100, 220
"""When faults begin, and when runs end; in batches."""

ALL_E5M2 = LinearFormat("dynamic", "tensor", input="e5m2", weight="e5m2", grad_output="e5m2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that may go wrong."""

    net: type[Net] | None
    """None is the demo's GPT, with its own data."""

    make: Callable[[], L.Callback | None] = lambda: None
    """A fresh fault."""

    scaling: Any = "fp8-dynamic"
    """The format of all layers in which it harms the run."""

    cause: Literal["precision", "other"] = "precision"

    rate: float | None = None
    """Learning rate; None is the net's own."""

    start: int = START
    """When it begins."""

    steps: int = STEPS

    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the Trainer."""


PRECISION: dict[str, Case] = {
    "aligned-pair": Case(net=TinyLlama, make=lambda: AlignedPair("blocks.*.mlp.*", bits=28)),
    "four-culprits": Case(
        net=TinyLlama,
        make=lambda: HotChannels("re:blocks.*(qkv|out|up|down)", bits=22, ramp=10),
    ),
    "channel-rows": Case(
        net=TinyLlama,
        make=lambda: HotChannels("blocks.*.mlp.gate", bits=20, ramp=20),
        scaling="fp8-rowwise",
    ),
    "all-e5m2": Case(net=Regressor, scaling=ALL_E5M2, rate=3e-2, start=0),
    "channel-mx": Case(
        net=TinyViT,
        make=lambda: HotChannels("blocks.*", bits=20, apart=32, ramp=20),
        scaling="mxfp8",
    ),
    "one-in-20": Case(net=TinyViT, make=lambda: HugeValue("patch", bits=24)),
    "one-in-20-delayed": Case(
        net=TinyViT,
        make=lambda: HugeValue("patch", bits=24),
        scaling="fp8-delayed",
    ),
    "hot-row": Case(
        net=TinyViT, make=lambda: HotRow("patch", bits=24, ramp=60), scaling="fp8-delayed"
    ),
    "two-optimizers": Case(
        net=BatchNormNet,
        make=lambda: HotChannels("encoder.3", bits=20, ramp=40),
        scaling="fp8-delayed",
    ),
}
"""What a format cannot bear, and high precision does not notice."""


def _innocent(
    net: type[Net] = NoisyRegressor,
    make: Callable[[], L.Callback | None] = lambda: None,
    **options: Any,
) -> Case:
    return Case(
        net=net, make=make, cause="other", start=innocents.START, steps=innocents.STEPS,
        options=options,
    )  # fmt: skip


OTHER: dict[str, Case] = {
    "compiled code": _innocent(innocents.CompiledCode),
    "bad launches": _innocent(innocents.BadLaunches),
    "flipped bit": _innocent(make=lambda: innocents.Once(innocents.flip_bit)),
    "layer initialised anew": _innocent(make=lambda: innocents.Once(innocents.initialise)),
    "pruning": _innocent(make=lambda: innocents.Once(innocents.prune)),
    "another objective": _innocent(innocents.OtherObjective),
    "one noisy rank": _innocent(innocents.OneNoisyRank, strategy="ddp_fork", devices=2),
    "other data": _innocent(make=innocents.OtherData),
    "learning rate": _innocent(make=innocents.learning_rate),
    "clock": _innocent(innocents.Clock),
    "memory bank": _innocent(innocents.MemoryBank),
    "warm restarts": _innocent(innocents.WarmRestarts),
}
"""What spoils a run in every format; nothing of it is precision's."""


def _demo(name: str) -> Case:
    """A fault of the demo, on the demo's GPT."""
    known = demo.CASES[name]
    return Case(
        net=None, make=known.make, scaling=known.scaling, cause=known.cause, start=150,
        steps=demo_run.STEPS,
    )  # fmt: skip


PRECISION |= {f"gpt {n}": _demo(n) for n, c in demo.CASES.items() if c.cause == "precision"}
OTHER |= {f"gpt {n}": _demo(n) for n, c in demo.CASES.items() if c.cause == "other"}

HEALTHY: dict[str, Case] = {
    "gpt healthy": Case(net=None, scaling="fp8-delayed", cause="other", steps=demo_run.STEPS),
    "llama healthy": Case(net=TinyLlama, scaling="fp8-rowwise", cause="other"),
    "vit healthy": Case(net=TinyViT, scaling="mxfp8", cause="other"),
    "batch-norm healthy": Case(net=BatchNormNet, scaling="fp8-delayed", cause="other"),
}
"""Nothing is wrong."""

CASES = PRECISION | OTHER | HEALTHY
"""All of them, by name."""
