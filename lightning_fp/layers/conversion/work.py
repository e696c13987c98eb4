"""What a forward does beside its linear layers: attention, other products, passes over memory.

Passes are counted as a compiler fuses them: whatever stands between two products is one loop. A
tensor costs memory where it crosses from one such loop to another or to a product, once written and
once read by each loop that needs it; inside of a loop it is free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from lightning_fp.layers.conversion.flops import counted_here, run_example
from lightning_fp.layers.experts.experts import FPExperts, is_switchable_experts
from lightning_fp.layers.linear import has_formats
from lightning_fp.layers.rules import clean_named_modules

_LOOKUPS = (torch.ops.aten.embedding.default,)


@dataclass(kw_only=True)
class LayerCalls:
    """What one linear layer multiplied in a forward."""

    tokens: list[int] = field(default_factory=list[int])
    """Of each call, the product of the input's leading dimensions."""

    inputs: list[int] = field(default_factory=list[int])
    """Of each call, the number of its input: layers of one input cast it once."""


@dataclass(kw_only=True)
class Work:
    """What one forward does, beside what its linear layers do in their own format."""

    layers: dict[str, LayerCalls] = field(default_factory=lambda: defaultdict(LayerCalls))
    """The linear layers that ran, by name."""

    attention_flops: int = 0
    """Of fused attention; where it is causal, of the half that is computed."""

    experts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list[int]))
    """Of each call of a module of experts, the rows of its products, by name."""

    product_flops: int = 0
    """Of products that no linear layer makes: convolutions, experts, attention by hand."""

    passes: int = 0
    """Bytes that loops between the products read and write."""

    @property
    def tokens(self) -> int:
        """Of the layer that saw most."""
        return max((max(each.tokens, default=0) for each in self.layers.values()), default=0)


@contextmanager
def counting_work(model: nn.Module) -> Iterator[Work]:
    """Count what a model does while the block runs its forward eagerly, on any device, also meta.

    Args:
        model: the model whose forward runs in the block.

    Yields:
        A record that is complete when the block ends.
    """
    counter = _Counter()
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    numbers: dict[int, int] = {}

    def before(module: nn.Linear, inputs: tuple[Any, ...], *, name: str) -> None:
        counter.inside += 1
        if not inputs:
            return
        x = inputs[0]
        calls = counter.work.layers[name]
        calls.tokens.append(x.numel() // max(x.shape[-1], 1))
        calls.inputs.append(numbers.setdefault(id(x), len(numbers)))
        counter.keep.append(x)  # its id stays its own

    def after(*_: Any) -> None:
        counter.inside -= 1

    def of_experts(
        experts: FPExperts, inputs: tuple[Any, ...], named: dict[str, Any], *, name: str
    ) -> None:
        counter.work.experts[name].append(experts.kind.rows(*inputs, **named))

    for name, module in clean_named_modules(model):
        if has_formats(module):
            hooks.append(module.register_forward_pre_hook(partial(before, name=name)))
            hooks.append(module.register_forward_hook(after))
        elif is_switchable_experts(module):
            hook: Any = partial(of_experts, name=name)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with _Attention(counter), counter:
            yield counter.work
    finally:
        for hook in hooks:
            hook.remove()


def example_work(model: nn.Module, example_input: Any) -> Work:
    """What one forward of `model` does; it leaves no trace in it.

    Args:
        model: on any device, also meta.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments.
    """
    with counting_work(model) as work:
        run_example(model, example_input)
    return work


def guessed_input(model: nn.Module, tokens: int) -> Tensor:
    """One sequence that a language model, or a stack of linear layers, would take.

    Args:
        model: any.
        tokens: its length.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return torch.zeros(1, tokens, dtype=torch.long, device="meta")
        if isinstance(module, nn.Linear):
            dtype = module.weight.dtype
            return torch.zeros(tokens, module.in_features, dtype=dtype, device="meta")
    return torch.zeros(tokens, 1, device="meta")


class _Attention(TorchFunctionMode):
    """Counts attention where it is asked for.

    Below that, a device without a kernel for it (meta) makes it of products and loops, which a card
    does not.
    """

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False), **kwargs)
        query, key, value = given["query"], given["key"], given["value"]
        rows = query.numel() // query.shape[-1]
        flops = 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self.counter.work.attention_flops += flops // 2 if given.get("is_causal") else flops
        self.counter.inside += 1
        try:
            return self.counter.one_kernel(func, args, kwargs)
        finally:
            self.counter.inside -= 1


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.formulas = {op: shape_wrapper(count) for op, count in counted_here().items()}
        self.inside = 0
        """How many linear layers run now; what they do is counted by their shapes."""
        self.loop = 0
        """The number of the loop between products that operations belong to now."""
        self.made: dict[int, int] = {}
        """By storage: the loop that wrote it; -1 for a product."""
        self.moved: set[tuple[int, int]] = set()
        """What was written (storage, -1) or read (storage, loop) and is counted already."""
        self.keep: list[Any] = []
        """Storages, so that no other takes the address of one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", func)
        formula = self.formulas.get(packet) or flop_registry.get(packet)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if self.inside:
            self._product(inputs, outputs)
        elif formula is not None:
            self.work.product_flops += formula(*args, **(kwargs or {}), out_val=result)
            self._product(inputs, outputs)
        elif func in _LOOKUPS:
            self.work.passes += 2 * _bytes(outputs[0])  # the rows that are read, and their copy
            self._write(outputs)
        else:
            self._loop(inputs, outputs)
        return result

    def one_kernel(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` returns, whose insides move nothing."""
        result = func(*args, **kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self._product(inputs, [each for each in tree_leaves(result) if isinstance(each, Tensor)])
        return result

    def _product(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for each in inputs:
            key = _storage(each)
            if self.made.get(key, -1) >= 0 and (key, -1) not in self.moved:
                self.moved.add((key, -1))
                self.work.passes += _bytes(each)
        before = {_storage(each) for each in inputs}
        fresh = [each for each in outputs if _storage(each) not in before]
        if fresh:
            self.loop += 1
        for each in fresh:
            self.made[_storage(each)] = -1
            self.keep.append(each.untyped_storage())

    def _loop(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for each in inputs:
            key = _storage(each)
            made = self.made.get(key)
            if made is None or made == self.loop or (key, self.loop) in self.moved:
                continue  # a Parameter, or what this loop has at hand
            self.moved.add((key, self.loop))
            self.work.passes += _bytes(each)
            if made >= 0 and (key, -1) not in self.moved:
                self.moved.add((key, -1))
                self.work.passes += _bytes(each)
        before = {_storage(each) for each in inputs}
        self._write([each for each in outputs if _storage(each) not in before])

    def _write(self, outputs: list[Tensor]) -> None:
        for each in outputs:
            self.made[_storage(each)] = self.loop
            self.keep.append(each.untyped_storage())


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """As it is in training under autocast or bf16: two bytes of each element."""
    return x.numel() * 2
