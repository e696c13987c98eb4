"""StoredWeight: a frozen weight of which only its FP8 cast and the scale are left.

To whoever asks it is a Parameter with the dtype that it had, of a byte per element. FP8 products
take the cast as it is; everything else computes with its values, rounded, in that dtype. What would
write to it is an error: what was written would be rounded away. Only `copy_`, by which checkpoints
are loaded, casts what it is given, and gives back bit for bit what it was cast from itself.

Where torch has no float8 dtype, or compiled code cannot store it (MPS, NVIDIA below sm89), the cast
is its bytes. It becomes that, and the dtype again, where it is moved between such devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_fp.kernels.gemm import cast_operand, widen
from lightning_fp.numerics import FloatFormat, amax_to_scale, tensor_amax
from lightning_fp.numerics.devices import has_dtype

aten: Any = torch.ops.aten


class StoredWeight(Tensor):
    """An FP8 tensor with one scale that looks like the tensor it was cast from.

    Args:
        cast: [out_features, in_features], in the format's dtype, or its bytes.
        scale: float32 scalar, what the weight was multiplied with before the cast.
        amax: float32 scalar, the weight's.
        dtype: the weight's.
        format: the 8-bit format of the cast.
        layer: its layer's name, for errors.
    """

    cast: Tensor
    scale: Tensor
    amax: Tensor
    format: FloatFormat
    layer: str

    @staticmethod
    def __new__(
        cls: type[StoredWeight],
        cast: Tensor,
        scale: Tensor,
        amax: Tensor,
        dtype: torch.dtype,
        format: FloatFormat,
        layer: str = "",
    ) -> StoredWeight:
        wrapper: Any = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, cast.size(), strides=cast.stride(), dtype=dtype, device=cast.device
        )
        return wrapper

    def __init__(
        self,
        cast: Tensor,
        scale: Tensor,
        amax: Tensor,
        dtype: torch.dtype,
        format: FloatFormat,
        layer: str = "",
    ) -> None:
        self.cast, self.scale, self.amax = cast, scale, amax
        self.format, self.layer = format, layer

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, format: FloatFormat, layer: str = "") -> StoredWeight:
        """What is kept of a weight: the cast of `fp8-dynamic`, by the tensor's own amax."""
        amax = tensor_amax(weight)
        scale = amax_to_scale(amax, format.max)
        wide = None if has_dtype(format, weight.device) else torch.float32
        cast, _ = cast_operand(weight.detach(), scale, format, wide)
        return cls(cast, scale, amax, weight.dtype, format, layer)

    def dequantised(self) -> Tensor:
        """Its values, in the dtype that it had; see `dequantised`."""
        return dequantised(self.cast, self.scale, self.amax, self.dtype, self.format)

    # -- as a Parameter --------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """False; to set it is an error."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> StoredWeight:
        """Nothing, or the error of whoever unfreezes the layer."""
        if requires_grad:
            raise ValueError(self._not("trained"))
        return self

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Itself; to assign to it is an error."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        raise ValueError(self._not("assigned to"))

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        copied: Any = torch.nn.Parameter(self.clone(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        shape = list(self.shape)
        return f"StoredWeight({self.format.name}, {shape}, dtype={self.dtype})"

    def _not(self, what: str) -> str:
        return (
            f"layer {self.layer!r}: its weight cannot be {what}: frozen='stored' has kept only its"
            f" FP8 cast; `lightning_fp.unstore(model, {self.layer!r})` gives it back, dequantised"
        )

    # -- as a tensor -----------------------------------------------------------------------------

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        stays = _STAYING.get(func)
        if stays is not None and isinstance(args[0], StoredWeight):
            return stays(*args, **kwargs)
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for written in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(written, StoredWeight):
                        raise ValueError(written._not("written to"))
        plain: Any = tree_map_only(StoredWeight, StoredWeight.dequantised, (args, kwargs))
        return func(*plain[0], **plain[1])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, FloatFormat]]:
        # Without the name: code compiled for one block would not serve the next.
        return ["cast", "scale", "amax"], (self.dtype, self.format)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor],
        kind: tuple[torch.dtype, FloatFormat],
        size: object,
        stride: object,
    ) -> StoredWeight:
        return StoredWeight(inner["cast"], inner["scale"], inner["amax"], *kind)


def dequantised(
    cast: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype, format: FloatFormat
) -> Tensor:
    """The values that a cast stands for.

    The largest come out as the amax itself, which the quotient may miss by a rounding: so to cast
    these values again gives the same cast and scale, and a run resumes bit for bit.

    Args:
        cast: FP8 or its bytes, any shape.
        scale: float32 scalar.
        amax: float32 scalar.
        dtype: of the result.
        format: of the cast.

    Returns:
        The shape of `cast`.
    """
    exact = widen(cast, format, torch.float32)
    largest = exact.abs() == format.max
    values = torch.where(largest, torch.copysign(amax, exact), exact * scale.reciprocal())
    return values.to(dtype)


# -- operators after which it still is one ---------------------------------------------------------

_Operator = Callable[..., Any]


def _each(weight: StoredWeight, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    # Moved as bytes, which every device has.
    cast = _as_held(change(weight.cast.view(torch.uint8)), weight.format)
    return StoredWeight(
        cast, change(weight.scale), change(weight.amax), dtype, weight.format, weight.layer
    )


def _as_held(cast: Tensor, format: FloatFormat) -> Tensor:
    dtype = format.dtype if has_dtype(format, cast.device) else None
    return cast if dtype is None else cast.view(dtype)


def _same(func: Any) -> _Operator:
    return lambda weight, **kwargs: _each(weight, lambda part: func(part, **kwargs), weight.dtype)


def _to(weight: StoredWeight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    wanted = weight.dtype if dtype is None else dtype
    if not wanted.is_floating_point:
        return aten._to_copy(weight.dequantised(), dtype=wanted, **kwargs)
    return _each(weight, lambda part: aten._to_copy(part, **kwargs), wanted)


def _empty(weight: StoredWeight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    """Of `to_empty`, which moves a model from the meta device; of other dtypes it is plain."""
    if dtype not in (None, weight.dtype):
        return aten.empty_like(weight.cast, dtype=dtype, **kwargs)
    return _each(weight, lambda part: aten.empty_like(part, **kwargs), weight.dtype)


def _copy(weight: StoredWeight, source: Tensor, non_blocking: bool = False) -> StoredWeight:
    """What is given is cast anew; another of its kind is taken over."""
    same = isinstance(source, StoredWeight) and source.format == weight.format
    if same or not source.is_floating_point():
        other = source
    else:
        other = StoredWeight.of(source.to(weight.dtype).expand(weight.shape), weight.format)
    if not isinstance(other, StoredWeight):
        raise ValueError(f"layer {weight.layer!r}: its weight must be real, got {source.dtype}")
    weight.cast.view(torch.uint8).copy_(other.cast.view(torch.uint8), non_blocking=non_blocking)
    for name in ("scale", "amax"):
        getattr(weight, name).copy_(getattr(other, name), non_blocking=non_blocking)
    return weight


_STAYING: dict[Any, _Operator] = {
    aten.detach.default: _same(aten.detach),
    aten.alias.default: _same(aten.alias),
    aten.clone.default: _same(aten.clone),
    aten._to_copy.default: _to,
    aten.empty_like.default: _empty,
    aten.copy_.default: _copy,
}
