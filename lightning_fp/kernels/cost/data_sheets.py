"""Cards by what their data sheets say, and how much of it matrix products reach.

Peaks are dense: where a data sheet prints FLOP/s with sparsity, half of them. The efficiencies are
those of public tables of single matrix products, of no training run: they were fixed before any
prediction of a whole step was looked at (docs/will-it-pay.md names each table).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Hardware = Literal["h100", "h200", "b200", "l40s", "rtx4090", "a100", "mi300"]
"""Cards that a prediction is made for, as `lightning-fp plan --hardware` reads them."""

BF16_EFFICIENCY = 0.80
FP8_EFFICIENCY = 0.71
"""Shares of the peak that a product over a very long dimension reaches on Hopper. FP8: DeepGEMM's
first table (H800, M=4096, K from 512 to 16384: 590 to 1358 TFLOP/s; its first README), within 5%.
Both: cuBLAS on an H100 SXM through torch, 765 and 1297 TFLOP/s at 8192 and more
(NVIDIA/cutlass#1662), within 4%. torchao's roofline has 0.78 for both."""

MEMORY_EFFICIENCY = 0.92
"""Share of the bandwidth that passes over large tensors reach: torchao's roofline, measured with
element-wise Triton kernels on H100 (torchao/testing/training/roofline_utils.py)."""

ATTENTION_EFFICIENCY = 0.35
"""Share of the bf16 peak that attention reaches in forward and backward on Hopper:
FlashAttention-2, as the paper of its successor gives it (arXiv 2407.08608)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSheet:
    """One card. FLOP/s are dense, of products that accumulate in float32."""

    name: str
    """As in sentences."""

    bf16: float
    """FLOP/s of bf16 products."""

    fp8: float | None
    """FLOP/s of FP8 products; None where this package has no way to its tensor cores."""

    bandwidth: float
    """Bytes per second of its memory."""

    memory: float
    """Bytes."""

    link: float
    """Bytes per second to its neighbours, in one direction: NVLink, Infinity Fabric or PCIe."""

    multiprocessors: int
    """How many tiles of a product run at once."""

    blocks: bool = False
    """Whether products with a scale per block run on it without emulation."""

    mx: bool = False
    """Whether MX formats do."""

    groups: bool = False
    """Whether torch has grouped FP8 products for it, with scales per row."""

    bf16_efficiency: float = BF16_EFFICIENCY
    """Share of `bf16` that a product over a very long dimension reaches."""

    fp8_efficiency: float = FP8_EFFICIENCY
    """Share of `fp8`, likewise."""

    attention_efficiency: float = ATTENTION_EFFICIENCY
    """Share of `bf16` that attention reaches."""

    source: str
    """Whence the peaks are."""

    assumed: str = ""
    """What of it no public table shows."""

    def multiplies_groups(self, casting: str) -> bool:
        """Whether experts are multiplied together, and not one after the other.

        Args:
            casting: how operands are cast.
        """
        return self.groups and (casting == "row" or (casting == "mx" and self.mx))


_LIKE_HOPPER = "the efficiencies of its products, for lack of a table: Hopper's"

DATA_SHEETS: dict[Hardware, DataSheet] = {
    "a100": DataSheet(
        name="A100 SXM 80 GB",
        bf16=312e12,
        fp8=None,
        bandwidth=2.039e12,
        memory=80e9,
        link=300e9,
        multiprocessors=108,
        attention_efficiency=0.6,
        source="NVIDIA A100 data sheet; attention: FlashAttention-2 (arXiv 2307.08691)",
        assumed=_LIKE_HOPPER,
    ),
    "rtx4090": DataSheet(
        name="GeForce RTX 4090",
        bf16=165.2e12,
        fp8=330.3e12,
        bandwidth=1.008e12,
        memory=24e9,
        link=32e9,
        multiprocessors=128,
        source="NVIDIA Ada GPU architecture, version 2, with float32 accumulation",
        assumed=_LIKE_HOPPER,
    ),
    "l40s": DataSheet(
        name="L40S",
        bf16=362.05e12,
        fp8=733e12,
        bandwidth=0.864e12,
        memory=48e9,
        link=32e9,
        multiprocessors=142,
        source="NVIDIA L40S data sheet",
        assumed=_LIKE_HOPPER,
    ),
    "h100": DataSheet(
        name="H100 SXM",
        bf16=989e12,
        fp8=1979e12,
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        multiprocessors=132,
        groups=True,
        source="NVIDIA H100 data sheet",
    ),
    "h200": DataSheet(
        name="H200 SXM",
        bf16=989e12,
        fp8=1979e12,
        bandwidth=4.8e12,
        memory=141e9,
        link=450e9,
        multiprocessors=132,
        groups=True,
        source="NVIDIA H200 data sheet",
    ),
    # Efficiencies: torch and CUTLASS on a B200, 1513 and 2545 TFLOP/s for 16384 x 4096 x 6144
    # (vllm-project/vllm#19566), which are 0.73 and 0.66 at the same K.
    "b200": DataSheet(
        name="B200",
        bf16=2250e12,
        fp8=4500e12,
        bandwidth=8e12,
        memory=180e9,
        link=900e9,
        multiprocessors=148,
        mx=True,
        groups=True,
        bf16_efficiency=0.73,
        fp8_efficiency=0.66,
        source="NVIDIA Blackwell data sheet",
        assumed="that attention reaches the share of the peak that it does on Hopper",
    ),
    "mi300": DataSheet(
        name="MI300X",
        bf16=1307e12,
        fp8=None,
        bandwidth=5.3e12,
        memory=192e9,
        link=448e9,
        multiprocessors=304,
        source="AMD Instinct MI300X data sheet",
        assumed=f"{_LIKE_HOPPER}; its FP8 products are not used here, FP8 is emulated in bf16",
    ),
}
"""The oldest first."""
