"""What the studies train: the tiny GPT and a small Llama, under whatever arm has to cope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.proof.arms import Arm, protection
from benchmarks.proof.faults import HotChannels
from benchmarks.proof.nets import Batches, TinyLlama
from lightning_fp.demo.presets import tiny


def gpt(lr: float, seed: int, steps: int, directory: Path, arm: Arm = "unprotected") -> Any:
    """The preset of `lightning-fp study sweep`."""
    model, data = tiny(lr, seed, steps)
    return model, data, {"callbacks": protection(arm, directory)}


def llama(lr: float, seed: int, steps: int, directory: Path, arm: Arm = "unprotected") -> Any:
    """RMSNorm, SwiGLU, rotary positions."""
    data = Batches(TinyLlama.batches(steps, seed))
    return TinyLlama(seed, lr), data, {"callbacks": protection(arm, directory)}


def growing(lr: float, seed: int, steps: int, bits: float = 0) -> Any:
    """The GPT with a channel into each MLP that it ignores, and that grows by so many bits a step.

    In exact arithmetic nothing happens.
    """
    model, data = tiny(lr, seed, steps)
    if not bits:
        return model, data
    start = steps // 4
    ramp = steps - start
    fault = HotChannels("blocks.*.mlp.up", bits=round(bits * ramp), ramp=ramp, start=start)
    fault.seed = seed
    return model, data, {"callbacks": [fault]}


NETS = {"gpt": gpt, "llama": llama, "growing": growing}
