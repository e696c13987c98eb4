"""Whether formats run on this machine, asked before hundreds of runs are started."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lightning_fp.format_names import AUTO
from lightning_fp.layers import convert
from lightning_fp.layers.format import FormatLike

_WIDTH = 128
"""Features of the layer that is tried: what every format's casts can share a scale over."""


def check_formats(names: Iterable[str]) -> None:
    """Train one small layer in each format.

    Args:
        names: of formats.

    Raises:
        ValueError: naming the first that does not run, and why.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in sorted(set(names) - set(AUTO)):
        layer = nn.Sequential(nn.Linear(_WIDTH, _WIDTH)).to(device)
        format: FormatLike = name
        try:
            convert(layer, format, layers={"*": format})
            x = torch.randn(_WIDTH, _WIDTH, device=device, requires_grad=True)
            with torch.autocast(device, torch.bfloat16):
                layer(x).float().square().mean().backward()
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"--formats: {name} does not run on this machine: {told}") from error
