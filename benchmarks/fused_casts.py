"""The fused casts: bytes that they move, and what compilers make of them for cards not here.

python benchmarks/fused_casts.py [--write]   # two minutes on one core; needs triton, no GPU
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_fp.kernels.cost import PASSES
from tests.kernels.triton.ahead import CAPABILITIES, VARIANTS, compiled, resources

RESULTS = Path(__file__).parent / "results" / "fused_casts.json"

BYTES = {
    # Read and written per element of a bf16 operand: the casts of forward and backward. An amax
    # that is not known costs a read; each layout a byte.
    "delayed": {"input": 2 + 2, "weight": (2 + 1) * 2, "grad_output": 2 + 2},
    "dynamic": {"input": 2 + 2 + 2, "weight": 2 + (2 + 1) * 2, "grad_output": 2 + 2 + 2},
}


def moved() -> dict[str, Any]:
    usual = PASSES["tensor"]
    before = {name: getattr(usual, name) for name in ("input", "weight", "grad_output")}
    table: dict[str, Any] = {"Inductor's": before}
    for name, fused in BYTES.items():
        less = 1 - sum(fused.values()) / sum(before.values())
        table[name] = {**fused, "less, square layer of as many tokens": round(less, 3)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    kernels = [
        {"sm": capability, "kernel": variant, "dtype": dtype, "format": "e4m3"}
        | resources(compiled(capability, variant, dtype, "e4m3"))
        for capability, variant, dtype in product(
            CAPABILITIES, ("amax", *VARIANTS), ("bf16", "fp32")
        )
    ]
    text = json.dumps({"bytes_per_element": moved(), "kernels": kernels}, indent=1)
    print(text)
    if parser.parse_args().write:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
