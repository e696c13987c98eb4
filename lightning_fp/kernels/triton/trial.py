"""Whether fused casts are used on a device: tried there once, before a layer depends on them."""

from __future__ import annotations

import logging
from functools import cache

import torch

from lightning_fp.kernels.triton.fused import available, fused_cast
from lightning_fp.numerics import FORMATS, scaled_cast

log = logging.getLogger(__name__)


def fuses_on(device: torch.device) -> bool:
    """Whether eager casts on a device are fused.

    The first answer waits for the device, so that a CUDA graph that is captured before has none.

    Args:
        device: any.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    if not available():
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _tried and torch.cuda.is_current_stream_capturing():
        return False
    return _works(index)


_tried: set[int] = set()
"""Devices of which the answer is known."""


@cache
def _works(index: int) -> bool:
    _tried.add(index)
    try:
        same = gives_torchs_bits(torch.device("cuda", index))
    except Exception as error:  # a compiler is missing, or does not know the card
        why = f"{type(error).__name__}: {error}"
    else:
        why = "" if same else "they round otherwise than torch"
    if why:
        log.warning("fused casts are not used on cuda:%d: %s", index, why)
    return not why


@torch.no_grad()
def gives_torchs_bits(device: torch.device) -> bool:
    """Whether fused casts of all finite bf16 values are those of torch.

    Args:
        device: where.
    """
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    x = codes.view(torch.bfloat16).view(256, 256)
    finite = torch.isfinite(x)
    scale = torch.tensor(0.37, device=device)
    for name in ("e4m3", "e5m2"):
        format = FORMATS[name]
        assert format.dtype is not None
        cast = fused_cast(x, format, scale)
        assert cast.rows is not None and cast.columns is not None
        wanted = scaled_cast(x, scale, format.dtype).view(torch.uint8)
        for found in (cast.rows, cast.columns.contiguous()):
            if not torch.equal(found.view(torch.uint8)[finite], wanted[finite]):
                return False
    return True
