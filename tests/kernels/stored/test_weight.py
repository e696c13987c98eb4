"""A weight of which only FP8 is left behaves as a Parameter that cannot be written to."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.numerics import FORMATS, devices

E4M3 = FORMATS["e4m3"]


def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(StoredWeight.of(weight, E4M3, "blocks.0.fc"), requires_grad=False)


def same(a: StoredWeight, b: StoredWeight) -> bool:
    casts = a.cast.view(torch.uint8), b.cast.view(torch.uint8)
    return torch.equal(*casts) and torch.equal(a.scale, b.scale) and torch.equal(a.amax, b.amax)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.floats(1e-9, 1e30),  # an amax of less than 1e-12 is no one's
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    format=st.sampled_from(["e4m3", "e5m2"]),
)
@example(seed=5111251, size=2.0**-23, spread=1.0, dtype=torch.float16, format="e5m2")
@example(seed=5111251, size=2.0**-6, spread=8.0, dtype=torch.float16, format="e5m2")
def test_to_cast_the_values_again_changes_nothing(
    seed: int, size: float, spread: float, dtype: torch.dtype, format: str
) -> None:
    torch.manual_seed(seed)
    limit = torch.finfo(dtype).max / 16
    weight = torch.randn(8, 8).mul_(torch.exp2(spread * torch.randn(8, 8))) * size
    weight = weight.clamp(-limit, limit).to(dtype)
    stored = StoredWeight.of(weight, FORMATS[format])
    values = stored.dequantised()
    # The steps of fp16's own subnormal values may be wider than those of the cast.
    fine = values.abs() >= (torch.finfo(dtype).tiny if dtype is torch.float16 else 0)
    assume(bool(fine[weight.abs() == weight.abs().amax()].all()))
    again = StoredWeight.of(values, FORMATS[format])
    assert torch.equal(again.cast.view(torch.uint8)[fine], stored.cast.view(torch.uint8)[fine])
    assert torch.equal(again.scale, stored.scale)
    assert torch.equal(again.amax, stored.amax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_values_are_as_near_as_the_format(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64).to(dtype)
    values = StoredWeight.of(weight, E4M3).dequantised()
    assert values.dtype is dtype
    assert values.abs().max() == weight.abs().max()
    smallest = weight.abs().max().float() / E4M3.max * 2.0**-10  # half the step of subnormals
    error = (values.float() - weight.float()).abs()
    bound = weight.float().abs() * 2.0**-4 * 1.1 + smallest
    assert (error <= bound).all()


def test_it_is_a_parameter_of_its_dtype_and_a_byte_per_element() -> None:
    stored = parameter(torch.randn(32, 64))
    assert isinstance(stored, nn.Parameter)
    assert (stored.shape, stored.dtype, stored.requires_grad) == ((32, 64), torch.float32, False)
    parts = [getattr(stored, name) for name in stored.__tensor_flatten__()[0]]
    assert sum(part.nbytes for part in parts) == 32 * 64 + 8


def test_operators_see_its_values() -> None:
    stored = parameter(torch.randn(32, 64))
    values = stored.dequantised()
    x = torch.randn(5, 64)
    assert torch.equal(stored + 1, values + 1)
    assert torch.equal(x @ stored.t(), x @ values.t())
    assert torch.equal(torch.zeros(32, 64).copy_(stored), values)
    assert torch.equal(torch.zeros(32, 64).add_(stored, alpha=2), 2 * values)
    assert type(stored.float()) is type(stored)
    assert torch.equal(stored.int(), values.int())


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.requires_grad_(),
        lambda weight: setattr(weight, "requires_grad", True),
        lambda weight: setattr(weight, "data", torch.zeros(4, 4)),
        lambda weight: weight.data.add_(1),
        lambda weight: weight.mul_(2),
        lambda weight: torch._foreach_add_([torch.ones(4, 4), weight], 1.0),
        lambda weight: nn.init.ones_(weight),
        lambda weight: torch.add(weight, 1, out=weight),
    ],
)
def test_whoever_writes_to_it_is_told_the_layer_and_the_way(write) -> None:
    weight = parameter(torch.randn(4, 4))
    before = weight.dequantised()
    with pytest.raises(ValueError, match=r"'blocks.0.fc'.*lightning_fp.unstore\(model, 'blocks.0"):
        write(weight)
    assert torch.equal(weight.dequantised(), before)


def test_what_is_copied_into_it_is_cast() -> None:
    weight, other = torch.randn(4, 8), torch.randn(4, 8)
    stored = parameter(weight)
    with torch.no_grad():
        stored.copy_(other)
    assert same(stored, StoredWeight.of(other, E4M3))
    with torch.no_grad():
        stored.copy_(parameter(weight))
    assert same(stored, StoredWeight.of(weight, E4M3))
    with pytest.raises(ValueError, match=r"'blocks.0.fc'.* must be real"):
        stored.copy_(torch.ones(4, 8, dtype=torch.int8))


def test_copies_and_moves() -> None:
    stored = parameter(torch.randn(4, 8))
    twin = copy.deepcopy(stored)
    assert isinstance(twin, nn.Parameter)
    assert same(twin, stored)
    assert twin.cast.data_ptr() != stored.cast.data_ptr()
    assert twin.layer == stored.layer
    narrow = stored.to(torch.bfloat16)
    assert (narrow.dtype, narrow.cast.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    assert stored.to("meta").device.type == stored.to("meta").cast.device.type == "meta"


def test_without_float8_dtypes_it_is_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS and below sm89; it becomes that, and float8 again, where it is moved."""
    weight = torch.randn(4, 8)
    stored = parameter(weight)
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
    made, moved = parameter(weight), stored.to(torch.bfloat16).float()
    assert [each.cast.dtype for each in (made, moved)] == [torch.uint8] * 2
    assert same(made, stored)
    assert same(moved, stored)
    assert torch.equal(made.dequantised(), stored.dequantised())
    with torch.no_grad():
        made.copy_(stored)
    assert same(made, stored)
    monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", None)
    back = made.clone()
    assert (back.cast.dtype, back.format) == (torch.float8_e4m3fn, E4M3)
    assert same(back, stored)
