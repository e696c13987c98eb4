"""A training step in simulated formats beside the same in bf16: compiled, d=256 GPT, on the CPU.

By processor time, interleaved in one process. Forward and backward, AdamW and all; the head is in
bf16, as it is by default in FP8. `python benchmarks/simulated_speed.py [FORMAT ...]` times those
that are named, without any all below; "e4m3-scaled" is FP8 with e4m3 gradients, which is emulated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import interleaved_cpu_seconds, report

from lightning_fp import convert
from lightning_fp.demo.model import ByteGPT

BATCH, CONTEXT = 8, 128
FORMATS = (
    "e8m3",
    "e8m3-truncate",
    "e8m3-stochastic",
    "e4m3",
    "e4m3-scaled",
    "e4m5-scaled",
)


def step_in(format: str) -> Callable[[], object]:
    """A step of a GPT of its own."""
    torch.manual_seed(0)
    model = ByteGPT(layers=4, width=256, heads=4, context=CONTEXT)
    convert(model, format, {"*head": "bf16"})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 256, (BATCH, CONTEXT + 1))

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    compiled = torch.compile(loss_of)

    def step() -> None:
        compiled(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    torch._dynamo.config.recompile_limit = 64
    formats = sys.argv[1:] or FORMATS
    seconds = interleaved_cpu_seconds({name: step_in(name) for name in ("bf16", *formats)})
    report(
        [
            (f"step in {name} / bf16, compiled", seconds[name] / seconds["bf16"], "<=", 2.0)
            for name in formats
        ]
    )


if __name__ == "__main__":
    main()
