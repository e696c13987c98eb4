"""What it gains to cast a weight once for 4 micro-batches: a d=256 GPT on the CPU, eager."""

from __future__ import annotations

import statistics
import sys
import warnings

import torch
from side_by_side import cpu_seconds, report

from lightning_fp import convert
from lightning_fp.demo.model import ByteGPT

MICRO_BATCHES, BATCH, CONTEXT = 4, 2, 64


class Accumulating:
    """One model and its optimizer; a call is one step of four micro-batches."""

    def __init__(self, share: bool) -> None:
        torch.manual_seed(0)
        self.model = ByteGPT(context=CONTEXT)
        self.table = convert(self.model, "fp8-delayed").precision_map
        self.table.scale_history.share_weight_casts = share
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.tokens = torch.randint(0, 256, (MICRO_BATCHES, BATCH, CONTEXT + 1))

    def __call__(self) -> None:
        for batch in self.tokens:
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model._loss(batch)
            loss.backward()
            self.table.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.table.step()


def main() -> None:
    warnings.simplefilter("ignore")
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    shared, apart = Accumulating(True), Accumulating(False)
    for _ in range(3):
        shared(), apart()
    ratios = [cpu_seconds(shared, runs=1) / cpu_seconds(apart, runs=1) for _ in range(runs)]
    report([("4 micro-batches, weights cast once / in each", statistics.median(ratios), "<=", 1.0)])


if __name__ == "__main__":
    main()
