"""torchao's grouped product: what it is handed, as far as a machine without a GPU can tell."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fp.kernels.grouped import torchao
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.layers.backends import kernel_for
from lightning_fp.layers.format import linear_format

SIZES = [5, 0, 1, 18, 0, 40]
ROWS = sum(SIZES) + 3


class Theirs:
    """In place of torchao's function: its checks, and the product in high precision."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.options: dict[str, Any] = {}

    def __call__(self, a: Tensor, b_t: Tensor, ends: Tensor, **options: Any) -> Tensor:
        self.options = options
        assert a.dtype is torch.bfloat16
        assert a.is_contiguous()
        assert b_t.stride()[-2:] == (1, b_t.shape[1])
        assert ends.dtype is torch.int32
        assert not (ends % self.multiple).any()
        out = a.new_full(
            (a.shape[0], b_t.shape[2]), torch.nan
        )  # behind the groups: whatever it was
        starts = [0, *ends.tolist()[:-1]]
        parts = [
            a[start:end].float() @ one.float()
            for start, end, one in zip(starts, ends.tolist(), b_t, strict=True)
        ]
        inside = torch.cat(parts).to(out.dtype)
        return torch.cat([inside, out[inside.shape[0] :]])


@pytest.mark.parametrize(("kind", "multiple"), [("rowwise", 16), ("mx", 32)])
def test_groups_are_padded_for_it_and_come_back_in_their_places(
    kind: Any, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Theirs(multiple)
    monkeypatch.setattr(torchao, "_function", lambda kind: theirs)
    x = torch.randn(ROWS, 64, requires_grad=True)
    w = torch.randn(len(SIZES), 32, 64, requires_grad=True)
    groups = Groups.of_counts(torch.tensor(SIZES), ROWS)
    y = torchao.torchao_groups(x, w, groups, "experts", kind)
    parts = x.detach()[: sum(SIZES)].bfloat16().float().split(SIZES)
    each = [part @ one.detach().bfloat16().float().t() for part, one in zip(parts, w, strict=True)]
    exact = torch.cat([*each, torch.zeros(3, 32)])
    torch.testing.assert_close(y, exact, rtol=2e-2, atol=2e-1)
    assert torch.equal(y[sum(SIZES) :], torch.zeros(3, 32))
    grad_x, grad_w = torch.autograd.grad(y.sum(), (x, w))
    assert grad_x.isfinite().all()
    assert grad_w.isfinite().all()
    assert not grad_w[1].any()


@pytest.mark.parametrize("kind", ["rowwise", "mx"])
def test_torchao_has_the_function_with_the_arguments_it_is_given(kind: Any) -> None:
    function = torchao._function(kind)
    names = list(inspect.signature(getattr(function, "__wrapped__", function)).parameters)
    assert names[:3] == ["A", "B_t", "offs"]
    options = {"out_dtype", "pad_token_groups_for_grouped_mm"}
    assert (options | ({"wgrad_with_hp"} if kind == "mx" else set())) <= set(names)


def test_sizes_that_hardware_does_not_multiply_are_refused() -> None:
    x, w = torch.randn(ROWS, 40), torch.randn(len(SIZES), 32, 40)
    groups = Groups.of_counts(torch.tensor(SIZES), ROWS)
    with pytest.raises(ValueError, match="layer 'experts': in_features must be a multiple of 16"):
        torchao.torchao_groups(x, w, groups, "experts", "rowwise")


def test_who_multiplies_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(format: str, cuda_fp8: bool) -> str:
        return kernel_for(linear_format(format), "auto", cuda_fp8=cuda_fp8).name_for_groups

    assert name("fp8-rowwise", False) == "native (emulated)"
    assert name("fp8-dynamic", False) == "native (emulated)"
    assert name("fp8-rowwise", True) == "torchao (grouped)"
    assert name("fp8-rowwise-gw-hp", True) == "torchao, one expert after the other"
    assert name("fp8-dynamic", True) == "native, one expert after the other"
    assert name("mxfp8", True) == "torchao (grouped)"
    monkeypatch.setattr("lightning_fp.kernels.torchao.has_grouped_fp8", lambda: False)
    assert name("fp8-rowwise", True) == "torchao, one expert after the other"
