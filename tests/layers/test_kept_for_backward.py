"""No layer keeps a cast copy of its weight: under FSDP2 it would keep the whole weight alive."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fp import convert
from tests.helper import FORMATS, saved_tensors


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [*FORMATS, "fp16", "e4m3", "e4m3-scaled", "e8m3-truncate"])
def test_backward_gets_the_parameter_itself(
    format: str, dtype: torch.dtype, autocast: bool
) -> None:
    plain = format in ("high", "bf16") and autocast and dtype is torch.float32
    layer = nn.Linear(48, 64, dtype=dtype)
    convert(nn.ModuleDict({"layer": layer}), format, layers={"*": format})
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    with saved_tensors() as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x)
    weight = layer.weight.untyped_storage().data_ptr()
    large = [each for each in kept if each.numel() >= layer.weight.numel()]
    copies = [each for each in large if each.untyped_storage().data_ptr() != weight]
    assert bool(copies) is plain  # autocast's own, which nn.Linear keeps as well
