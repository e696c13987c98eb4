"""Who reads a gathered weight besides its layer: found out by looking on at forwards.

A layer that is gathered in FP8 multiplies by the cast, which is what the weight's own would be. A
penalty on the weight, DoRA's norm, an embedding that looks up rows of a head's weight find the
values that the cast stands for. So such weights are gathered as they are.

Looked at are operations, not lines of code: whoever asks for a weight's dtype reads nothing of it.
What compiled code does is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TO_THE_HOST = frozenset({"item", "tolist", "numpy", "__array__", "__float__"})
"""What reads values and returns no tensor. Whatever else returns none reads none: size, dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A weight that is looked at."""

    parameter: Any
    """FSDP2's own record of it, an FSDPParam."""

    multiplies: Callable[[], bool]
    """Whether its layer multiplies now."""

    read: Callable[[str], object]
    """Told a name of what reads it besides."""


class LooksOn(TorchDispatchMode):
    """Within, notices what reads gathered weights while their layers do not multiply.

    Args:
        weights: that are looked at.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Iterable[Watched]) -> None:
        super().__init__()
        self._unknown = list(weights)
        self._known: dict[int, Watched] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code goes on as it is."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not getattr(func, "is_view", False) and getattr(func, "namespace", "") != "fsdp":
            self._learn()
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, Tensor):
                    weight = self._known.get(_memory_of(each))
                    if weight is not None and not weight.multiplies():
                        weight.read(str(func))
        return func(*args, **kwargs)

    def _learn(self) -> None:
        """Where weights lie that are gathered for the first time."""
        unknown: list[Watched] = []
        for weight in self._unknown:
            if gathered := weight.parameter.all_gather_outputs:
                self._known[_memory_of(gathered[0])] = weight
            else:
                unknown.append(weight)
        self._unknown = unknown


def _memory_of(x: Tensor) -> int:
    """The same for all views of a tensor, and when its memory is freed and made again."""
    local = getattr(x, "_local_tensor", x)
    try:
        return local.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # tensors without memory: sparse, functional
        return 0


GRAD: Any = Tensor.grad.__get__  # pyright: ignore


class TellingWeight(nn.Parameter):
    """A weight that stays gathered after forward, until backward: it tells what reads it."""

    _told: Callable[[str], object]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = func.__name__
        if func == GRAD:
            return result
        if name in TO_THE_HOST or any(isinstance(each, Tensor) for each in tree_leaves(result)):
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, TellingWeight):
                    vars(each)["_told"]("an attribute" if name == "__get__" else name)
        return result


def have_tell(weight: nn.Parameter, told: Callable[[str], object]) -> None:
    """From here on a weight tells what reads it.

    Args:
        weight: that of a layer, whole.
        told: called with a name of what does.
    """
    weight.__class__ = TellingWeight
    vars(weight)["_told"] = told


def have_rest(weight: nn.Parameter) -> None:
    """It is a Parameter as any."""
    if isinstance(weight, TellingWeight):
        del vars(weight)["_told"]
        cast(Any, weight).__class__ = nn.Parameter
