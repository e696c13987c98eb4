"""Whether sampled steps pay with a compiled graph of their own: a d=256 GPT, compiled by blocks.

A step that takes statistics is another program than one that does not. Today each has its graph.
One graph for both would take the statistics in every step and drop those that nobody asked for. So
this script measures what the second graph costs, once, in seconds of compilation, and what one
graph for all would cost, in each step. Inductor's cache is empty at the start, as in a first run.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
import warnings

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()

import torch
from side_by_side import report

from lightning_fp import convert
from lightning_fp.demo.model import ByteGPT
from lightning_fp.layers.statistics_table import StatisticsTable, observable

BATCH, CONTEXT, STEPS = 8, 64, 40


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteGPT(context=CONTEXT)
    table = convert(model, "fp8-dynamic").precision_map
    for region in (*model.blocks, model.head):
        region.compile()
    observed = StatisticsTable(observable(table.layers))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (BATCH, CONTEXT + 1))

    def step(sampled: bool) -> float:
        began = time.perf_counter()
        observed.collect(sampled)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model._loss(tokens).backward()
        optimizer.step()
        table.step()
        if sampled:
            observed.take()
        return time.perf_counter() - began

    first = {sampled: step(sampled) for sampled in (False, True)}
    took: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(STEPS):
        for sampled in took:
            took[sampled].append(step(sampled))
    plain, full = (statistics.median(took[sampled]) for sampled in (False, True))
    compiling = first[True] - full
    print(f"the first graph took {first[False] - plain:.1f} s, the second one {compiling:.1f} s")
    report(
        [
            ("a step with statistics over one without", full / plain, ">=", 1.0),
            ("steps after which the second graph has paid", compiling / (full - plain), ">=", 0.0),
        ]
    )


if __name__ == "__main__":
    main()
