"""What the cost model predicts, beside public figures of training runs and of single layers.

python benchmarks/predicted.py [--write]   # a minute on one core; no GPU, nothing is measured here

Three parts. *Explained*: what share of public steps in bf16 alone the model explains with products,
attention, loops and optimizer; its median is `EXPLAINED` of the package. *Layers*: single FP8
layers, which the model was not fitted to. *Steps*: whole runs in FP8 over the same runs in bf16,
which it was not fitted to either; torchao's of Llama-3-8B on H100 were known when it was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.kernels.cost import (
    DATA_SHEETS,
    DataSheet,
    gains,
    predicted_speedup,
    product_seconds,
)
from lightning_fp.layers.conversion.prediction import EXPLAINED, Prediction, predict
from lightning_fp.layers.conversion.work import Work, counting_work
from lightning_fp.layers.format import linear_format

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from models import llama_like

RESULTS = Path(__file__).parent / "results" / "predicted.json"
H100 = DATA_SHEETS["h100"]
LIMITED = dataclasses.replace(
    H100, name="H100 96 GB, 500 W", bandwidth=2.4e12, bf16_efficiency=0.61, fp8_efficiency=0.617
)
"""The cards of torchtitan's and torchao's figures (torchtitan/benchmarks/
llama3_h100_202412_torchtitan.md): less bandwidth, and a limit of 500 W, under which products of
8192 reach 585 TFLOP/s in bf16 and 1126 in FP8 by rows (pytorch/FBGEMM#2546)."""

FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md, H100 80GB"
MPT = {"1b": (2048, 16, 24), "3b": (2560, 32, 32), "7b": (4096, 32, 32), "13b": (5120, 40, 40)}
"""Width, heads, layers."""

BF16_RUNS = [  # model, length, micro-batch, tokens per second and GPU; 8 GPUs, nothing recomputed
    ("13b", 2048, 2, 4792),
    ("7b", 2048, 6, 10643),
    ("3b", 8192, 3, 16578),
    ("3b", 4096, 5, 20964),
    ("3b", 1024, 20, 27046),
    ("3b", 512, 40, 27965),
    ("1b", 8192, 3, 29157),
    ("1b", 4096, 7, 38535),
    ("1b", 2048, 14, 45455),
    ("1b", 1024, 18, 48910),
    ("1b", 512, 56, 52275),
]
FP8_RUNS = [  # the same with amp_fp8: Transformer Engine, one scale per tensor, delayed
    ("3b", 8192, 3, 19146 / 16578),
    ("3b", 512, 40, 36527 / 27965),
    ("1b", 8192, 3, 32010 / 29157),
    ("1b", 512, 56, 70315 / 52275),
]
LAYERS = [  # card, casting, tokens, in, out, public speed-up, where
    (H100, "tensor", 1024, 2048, 1024, 0.80, "pytorch/ao#794"),
    (H100, "tensor", 4096, 8192, 16384, 1.39, "pytorch/ao#794"),
    (LIMITED, "row", 16384, 8192, 1280, 1.11, "pytorch/ao#2185"),
    (LIMITED, "row", 16384, 1024, 8192, 1.43, "pytorch/ao#2185"),
    (LIMITED, "row", 16384, 8192, 7168, 1.73, "pytorch/ao#2185"),
    (LIMITED, "row", 16384, 3584, 8192, 1.71, "pytorch/ao#2185"),
]
PRODUCTS = [  # M, K, N, operands, public TFLOP/s, where
    (4096, 7168, 2112, "fp8", 1058, "deepseek-ai/DeepGEMM, first README"),
    (4096, 1536, 24576, "fp8", 990, "deepseek-ai/DeepGEMM, first README"),
    (4096, 512, 32768, "fp8", 590, "deepseek-ai/DeepGEMM, first README"),
    (4096, 16384, 7168, "fp8", 1358, "deepseek-ai/DeepGEMM, first README"),
    (4096, 7168, 4096, "fp8", 1304, "deepseek-ai/DeepGEMM, first README"),
    (4096, 2048, 7168, "fp8", 1025, "deepseek-ai/DeepGEMM, first README"),
    (8192, 8192, 8192, "bf16", 765, "NVIDIA/cutlass#1662"),
    (8192, 8192, 8192, "fp8", 1297, "NVIDIA/cutlass#1662"),
]
TORCHAO = "torchao, docs/source/workflows/training.md: Llama-3-8B, 8 GPUs, 8192 tokens, compiled"


class MPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class MPTModel(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50368, width)
        self.blocks = nn.Sequential(*(MPTBlock(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 50368, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def count(model: nn.Module, batch: int, length: int) -> Work:
    with torch.no_grad(), counting_work(model) as work:
        model(torch.zeros(batch, length, dtype=torch.long, device="meta"))
    return work


def mpt(name: str, length: int, batch: int) -> tuple[nn.Module, Work]:
    with torch.device("meta"):
        model = MPTModel(*MPT[name])
    return model, count(model, batch, length)


def prediction(
    model: nn.Module, work: Work, card: DataSheet, format: str, **how: Any
) -> Prediction:
    formats = {name: linear_format("bf16" if "head" in name else format) for name in work.layers}
    return predict(model, formats, card, work, devices=8, **how)


def explained() -> list[dict[str, Any]]:
    rows = []
    for name, length, batch, public in BF16_RUNS:
        model, work = mpt(name, length, batch)
        found = prediction(model, work, H100, "bf16")
        step = batch * length / public
        rows.append(
            {
                "model": f"MPT-{name}",
                "length": length,
                "micro_batch": batch,
                "tokens_per_second": public,
                "explained": (found.linears_bf16 + found.known) / step,
            }
        )
    return rows


def layers() -> list[dict[str, Any]]:
    return [
        {
            "card": card.name,
            "casting": casting,
            "tokens": tokens,
            "in_features": k,
            "out_features": n,
            "predicted": predicted_speedup(card, casting, tokens, k, n),
            "public": public,
            "source": source,
        }
        for card, casting, tokens, k, n, public, source in LAYERS
    ]


def products() -> list[dict[str, Any]]:
    return [
        {
            "m": m,
            "k": k,
            "n": n,
            "operands": operands,
            "predicted": 2e-12 * m * k * n / product_seconds(H100, m, k, n, operands),
            "public": public,
            "source": source,
        }
        for m, k, n, operands, public, source in PRODUCTS
    ]


def steps() -> list[dict[str, Any]]:
    rows = []

    def row(what: str, card: DataSheet, predicted: Prediction, public: float, source: str) -> None:
        rows.append(
            {
                "run": what,
                "card": card.name,
                "predicted": predicted.speedup_end_to_end,
                "public": public,
                "source": source,
            }
        )

    for name, length, batch, public in FP8_RUNS:
        model, work = mpt(name, length, batch)
        what = f"MPT-{name}, {length} tokens, Transformer Engine"
        row(
            what,
            H100,
            prediction(model, work, H100, "fp8-delayed", backend="transformer-engine"),
            public,
            FOUNDRY,
        )
    with torch.device("meta"):
        llama, _ = llama_like()
    work = count(llama, 1, 8192)
    for what, format, gather, cards, public in (
        ("rowwise", "fp8-rowwise", False, (LIMITED, H100), 6768 / 6150),
        ("tensorwise, FP8 all-gather", "fp8-dynamic", True, (LIMITED, H100), 7689.5 / 6150),
        ("tensorwise, FP8 all-gather", "fp8-dynamic", True, (DATA_SHEETS["b200"],), 1.254),
        ("rowwise", "fp8-rowwise", False, (DATA_SHEETS["b200"],), 1.040),
        ("mxfp8", "mxfp8", False, (DATA_SHEETS["b200"],), 1.200),
    ):
        for card in cards:
            found = prediction(llama, work, card, format, fp8_all_gather=gather)
            row(f"Llama-3-8B, {what}", card, found, public, TORCHAO)
    return rows


def cards() -> list[dict[str, Any]]:
    """Llama-3-8B on eight of each card, with the layers that conversion would choose."""
    with torch.device("meta"):
        llama, _ = llama_like()
    work = count(llama, 1, 8192)
    rows = []
    for name, card in DATA_SHEETS.items():
        row: dict[str, Any] = {"hardware": name}
        for casting, format in (("tensor", "fp8-dynamic"), ("row", "fp8-rowwise")):
            formats = {}
            for layer in work.layers:
                linear = llama.get_submodule(layer)
                shape = linear.in_features, linear.out_features
                small = card.fp8 is not None and not gains(casting, *shape, card=card)
                formats[layer] = linear_format("bf16" if layer == "lm_head" or small else format)
            found = predict(llama, formats, card, work, devices=8)
            row[format] = [found.speedup, found.speedup_end_to_end]
            sizes = (1024, 2048, 4096, 8192)
            row[f"{format} gains from"] = next(
                (size for size in sizes if gains(casting, size, size, card=card)), None
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    shares = explained()
    result = {
        "explained": {
            "used": EXPLAINED,
            "median": statistics.median(row["explained"] for row in shares),
            "source": FOUNDRY,
            "runs": shares,
        },
        "products": products(),
        "layers": layers(),
        "steps": steps(),
        "cards": cards(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if parser.parse_args().write:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
