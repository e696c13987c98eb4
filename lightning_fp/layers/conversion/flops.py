"""How much of a model's arithmetic is in which layer.

Known without running are linear layers alone. In a forward torch counts every product; what it does
not see, because one operator does it all (recurrent layers, nn.Bilinear, grouped products), has a
formula here.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_fp.kernels.padding import padded_share
from lightning_fp.layers.conversion.einsum_flops import EinsumAsWritten
from lightning_fp.layers.experts.experts import is_switchable_experts
from lightning_fp.layers.experts.kinds import experts_per_token, kind_of
from lightning_fp.layers.linear import is_switchable_linear
from lightning_fp.layers.rules import clean_named_modules

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


ITSELF = "."
"""Where the FLOPs are of a model that multiplies itself; under "" are those of everything."""


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _grouped(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """Of `torch._grouped_mm` and its likes: every row of the tokens meets one group's matrix."""
    rows = a_shape[1:] if len(a_shape) > len(b_shape) else a_shape
    return 2 * math.prod(rows) * b_shape[-1]


def counted_here() -> dict[Any, Any]:
    """What torch's counter does not count by itself (2.11 to 2.13), by operator."""
    formulas: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
        torch.ops.aten._grouped_mm: _grouped,
        torch.ops.aten._scaled_grouped_mm: _grouped,
        torch.ops.lightning_fp.grouped_of_rows: _grouped,
        torch.ops.lightning_fp.grouped_over_rows: _grouped,
    }
    theirs = torch.ops.transformers  # what its experts fall back to, once it is imported
    if hasattr(theirs, "grouped_mm_fallback"):
        formulas[theirs.grouped_mm_fallback] = _grouped
    return formulas


def _recurrent(module: nn.RNNBase, input: Any) -> int:
    """Every matrix of a recurrent layer meets every token."""
    data = getattr(input, "data", input)  # of a PackedSequence
    matrices = [p.numel() for p in module.parameters() if p.dim() == 2]
    return 2 * sum(matrices) * (data.numel() // module.input_size)


def _bilinear(module: nn.Bilinear, input: Any) -> int:
    """Per row, `in1 x in2 x out` products, and `in2 x out` with their sums."""
    rows = input.numel() // module.in1_features
    return 2 * rows * module.out_features * module.in2_features * (module.in1_features + 1)


def _formula(module: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    """FLOPs of a module that runs as one operator; None for all others."""
    if isinstance(module, nn.RNNBase) and inputs:
        return _recurrent(module, inputs[0])
    if isinstance(module, nn.Bilinear) and inputs:
        return _bilinear(module, inputs[0])
    return None


def multiplies(module: nn.Module) -> bool:
    """Whether a module has matrices of its own, by which it multiplies as far as one can see.

    Lookups and norms do not, nor do Parameters of one row, as position embeddings are.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)):
        return False
    return any(
        is_lazy(p) or (p.dim() > 1 and p.shape[0] > 1 and math.prod(p.shape[1:]) > 1)
        for p in module.parameters(recurse=False)
    )


def size(module: nn.Module) -> int:
    """Elements of a module's own Parameters; those that wait for the first batch count as none."""
    return sum(0 if is_lazy(p) else p.numel() for p in module.parameters(recurse=False))


def flops_per_token(module: nn.Module) -> int:
    """FLOPs of one token, known without running; 0 where it is not.

    Those of convolutions depend on the input, and those of experts on how many see a token.
    """
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    if isinstance(module, nn.MultiheadAttention):
        return 2 * 3 * module.embed_dim**2
    kind = kind_of(module)
    if kind is not None:
        weights = kind.weights(module)
        per_expert = sum(weight.numel() for weight in weights) // weights[0].shape[0]
        return 2 * per_expert * (experts_per_token(module) or 0)
    return 0


@contextmanager
def counting_flops(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the FLOPs of a model and of its layers while the block runs eagerly.

    Matrix products, attention and convolutions count; element-wise operations do not.

    Args:
        model: the model whose forward runs in the block.

    Yields:
        A dict that is complete when the block ends: FLOPs by name of every module with matrices of
        its own, without those of such modules inside (of the model itself under `ITSELF`), in the
        order in which they ran; those of everything together under "".
    """
    flops: dict[str, int] = defaultdict(int)
    counter = FlopCounterMode(display=False, custom_mapping=counted_here())
    einsums = EinsumAsWritten(counter.get_total_flops)
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    unseen = 0
    running: list[list[int]] = []
    """Of each module that runs now: the count where it began, the FLOPs of layers inside it."""

    def count() -> int:
        return counter.get_total_flops() + einsums.left_out + unseen

    def before(*_: Any) -> None:
        running.append([count(), 0])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any, *, name: str) -> None:
        nonlocal unseen
        start, inside = running.pop()
        formula = _formula(module, inputs)
        if formula is not None:
            unseen += formula - (count() - start)
        own = count() - start - inside
        if is_switchable_experts(module):  # whose tokens these were, nobody has counted
            for row in module.apart.values():
                flops[row.fqn] += own // module.shape.experts
            own -= own // module.shape.experts * len(module.apart)
        flops[name] += own
        if running:
            running[-1][1] += count() - start

    for name, module in clean_named_modules(model):
        if isinstance(module, nn.MultiheadAttention) or multiplies(module):
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(partial(after, name=name or ITSELF)))
    # In evaluation nn.MultiheadAttention and nn.TransformerEncoderLayer run one fused operator,
    # which the counter does not know and which skips the linear layers inside.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, einsums:
            yield flops
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
    flops[""] = count()


@contextmanager
def counting_padding(model: nn.Module) -> Iterator[dict[str, float]]:
    """Count what zeros that fill up blocks will cost, as the forwards in the block have tokens.

    Args:
        model: the model whose forward runs in the block, converted.

    Yields:
        A dict that is complete when the block ends: by layer, the share of its FLOPs of forward and
        backward that zeros take on the hardware of its kernel, 0 to 1.
    """
    counts: dict[str, tuple[int, int]] = {}
    shares: dict[str, float] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], *, name: str) -> None:
        if not (is_switchable_linear(module) and inputs):
            return
        tokens = inputs[0].numel() // max(inputs[0].shape[-1], 1)
        shape = module.in_features, module.out_features
        zeros, flops = counts.get(name, (0, 0))
        zeros += module.kernel.padding(tokens, *shape)
        counts[name] = zeros, flops + 3 * tokens * flops_per_token(module)

    hooks = [
        module.register_forward_pre_hook(partial(count, name=name))
        for name, module in clean_named_modules(model)
        if is_switchable_linear(module)
    ]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
    shares.update({name: padded_share(*each) for name, each in counts.items()})


def example_flops(model: nn.Module, example_input: Any) -> tuple[dict[str, int], dict[str, float]]:
    """FLOPs of one forward of `model`, which leaves no trace in it.

    Args:
        model: on any device, also meta.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        FLOPs by layer name, the whole model's under ""; and see `counting_padding`.
    """
    with counting_flops(model) as flops, counting_padding(model) as padding:
        run_example(model, example_input)
    return flops, padding


def run_example(model: nn.Module, example_input: Any) -> None:
    """One forward, eager and in evaluation, that leaves no trace in the model.

    Args:
        model: as `example_flops`.
        example_input: likewise.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    arguments = _to_device(example_input, device)
    training = [module for module in model.modules() if module.training]
    rng_devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(rng_devices),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
        ):
            # torch's counter has hooks, of which torch.compile warns although it is off here.
            warnings.filterwarnings("ignore", "Using `torch.compile")
            if isinstance(arguments, Mapping):
                model(**arguments)
            elif isinstance(arguments, (tuple, list)):
                model(*arguments)
            else:
                model(arguments)
    finally:
        for module in training:
            module.training = True


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device) for item in value)
    return value
