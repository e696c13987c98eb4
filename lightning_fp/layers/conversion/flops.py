"""How much of a model's arithmetic is in which layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_fp.layers.rules import clean_name

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


_NOT_IN_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}
"""What torch's counter does not count by itself (2.11 to 2.13)."""


def flops_per_token(module: nn.Module) -> int:
    """FLOPs of one token, known without running; 0 for convolutions, which depend on the input."""
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    if isinstance(module, nn.MultiheadAttention):
        return 2 * 3 * module.embed_dim**2
    return 0


@contextmanager
def counting_flops(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the FLOPs of a model and of its layers while the block runs eagerly.

    Matrix products, attention and convolutions count; element-wise operations do not.

    Args:
        model: the model whose forward runs in the block.

    Yields:
        A dict that is complete when the block ends: FLOPs by name of every linear, attention and
        convolution module, those of everything together under "".
    """
    flops: dict[str, int] = defaultdict(int)
    counter = FlopCounterMode(display=False, custom_mapping=_NOT_IN_TORCH)
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for fqn, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS)):
            continue

        def before(*_: Any, name: str = clean_name(fqn)) -> None:
            flops[name] -= counter.get_total_flops()

        def after(*_: Any, name: str = clean_name(fqn)) -> None:
            flops[name] += counter.get_total_flops()

        hooks.append(module.register_forward_pre_hook(before))
        hooks.append(module.register_forward_hook(after))
    # In evaluation nn.MultiheadAttention and nn.TransformerEncoderLayer run one fused operator,
    # which the counter does not know and which skips the linear layers inside.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter:
            yield flops
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
    flops[""] = counter.get_total_flops()


def example_flops(model: nn.Module, example_input: Any) -> dict[str, int]:
    """FLOPs of one forward of `model`, which leaves no trace in it.

    Args:
        model: on any device, also meta.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        FLOPs by layer name, the whole model's under "".
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    arguments = _to_device(example_input, device)
    training = [module for module in model.modules() if module.training]
    rng_devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with (
            torch.random.fork_rng(rng_devices),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            counting_flops(model) as flops,
        ):
            if isinstance(arguments, Mapping):
                model(**arguments)
            elif isinstance(arguments, (tuple, list)):
                model(*arguments)
            else:
                model(arguments)
    finally:
        for module in training:
            module.training = True
    return flops


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device) for item in value)
    return value
