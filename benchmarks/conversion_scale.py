"""Converting a model with 10,000 linears, and what a step's bookkeeping costs per layer."""

from __future__ import annotations

import time

import torch
from side_by_side import cpu_seconds, report
from torch import nn

from lightning_fp import convert
from lightning_fp.kernels.torchao import import_float8


def layers(count: int, device: str = "meta") -> nn.ModuleList:
    with torch.device(device):
        return nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(count))


def main() -> None:
    import_float8()  # once per process, and not part of converting
    model = layers(10_000)
    start = time.process_time()  # the work itself: one thread, on a machine that others use
    converted = convert(model, layers={"*7": "bf16", "re:1.*": "fp8-rowwise"})
    str(converted)
    claims = [
        ("seconds to convert and report 10,000 linears", time.process_time() - start, "<=", 2)
    ]

    few, many = (convert(layers(count), "fp8-dynamic").precision_map for count in (1_000, 11_000))
    step = {"few": cpu_seconds(few.step), "many": cpu_seconds(many.step)}
    claims.append(
        (
            "microseconds of bookkeeping per layer and step",
            (step["many"] - step["few"]) / 10_000 * 1e6,
            "<=",
            2,
        )
    )

    with torch.device("cpu"):
        small = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(1_000))
    delayed = convert(small, "fp8-delayed").precision_map
    for layer in small:
        layer(torch.randn(16, 16)).sum().backward()
    delayed.step()
    update = cpu_seconds(delayed.step)
    claims.append(("milliseconds to update the scales of 1,000 layers", update * 1e3, "<=", 2))
    report(claims)


if __name__ == "__main__":
    main()
