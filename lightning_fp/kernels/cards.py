"""What runs how on which card, without having one: for plans and for whoever is about to rent.

By the rules of torch 2.11 and later (2.13 for `fp8-block`), torchao 0.18 and Transformer Engine
2.20. None of it was measured here; docs/on-the-gpu.md says what is proven.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Cards:
    """Cards that multiply alike."""

    names: str
    architecture: str
    fp8: str
    """What becomes of per-tensor and per-row scales."""

    blocks: str
    """What becomes of `fp8-block`, `mxfp8` and `nvfp4`."""


_PRODUCTS = "FP8 tensor cores"
_BLOCKS = "fp8-block (from CUDA 12.9 on)"
_BELOW = "emulated in bf16, rounded by integers: Triton stores no float8 (pytorch#167082)"
_EMULATED = "emulated with backend='native', rounded by integers"

CARDS = (
    Cards(names="V100, T4", architecture="sm70, sm75", fp8=_BELOW, blocks=_EMULATED),
    Cards(
        names="A100, A10, A40, RTX 30, RTX A6000",
        architecture="sm80, sm86",
        fp8=_BELOW,
        blocks=_EMULATED,
    ),
    Cards(
        names="L4, L40, L40S, RTX 40, RTX 6000 Ada",
        architecture="sm89",
        fp8=_PRODUCTS,
        blocks="emulated with backend='native'",
    ),
    Cards(names="H100, H200, GH200", architecture="sm90", fp8=_PRODUCTS, blocks=_BLOCKS),
    Cards(
        names="B200, B300, GB200, GB300",
        architecture="sm100, sm103",
        fp8=_PRODUCTS,
        blocks="mxfp8 with torchao or Transformer Engine; fp8-block, nvfp4 with the latter",
    ),
    Cards(
        names="RTX 50, RTX PRO Blackwell",
        architecture="sm120",
        fp8=_PRODUCTS,
        blocks=f"{_BLOCKS} and nvfp4 with Transformer Engine",
    ),
    Cards(
        names="MI300, MI325 (ROCm)",
        architecture="gfx942",
        fp8="emulated in bf16",
        blocks="emulated with backend='native'",
    ),
    Cards(
        names="Apple (MPS)",
        architecture="",
        fp8="emulated in float32, rounded by integers: there is no float8 dtype",
        blocks=_EMULATED,
    ),
)
"""The oldest first."""
