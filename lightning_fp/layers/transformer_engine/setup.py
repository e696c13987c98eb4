"""What must be so before Transformer Engine multiplies a model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_fp.kernels.transformer_engine.library import library
from lightning_fp.layers.regions import compiled_regions


def check_model(model: nn.Module, delayed: Iterable[str]) -> None:
    """Refuse models that it cannot work in.

    Args:
        model: the model.
        delayed: the layers to be put under delayed scaling.

    Raises:
        ValueError: naming what is in the way, and the alternative.
    """
    library()
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "backend 'transformer-engine' must not be used under FSDP1, which flattens the weights;"
            " use FSDP2 (ModelParallelStrategy, fully_shard) or DDP"
        )
    delayed = list(delayed)
    _check_one_device(model, delayed)
    check_delayed_is_eager(model, delayed)


def _check_one_device(model: nn.Module, delayed: Sequence[str]) -> None:
    """Under delayed scaling it gathers the amaxes of all layers in one tensor."""
    places = {name: model.get_submodule(name).weight.device for name in delayed}
    for name, device in places.items():
        first = places[delayed[0]]
        if device != first:
            raise ValueError(
                f"backend 'transformer-engine' needs all layers under 'fp8-delayed' on one device,"
                f" got {delayed[0]!r} on {first} and {name!r} on {device}; take 'fp8-dynamic', or"
                " backend='auto'"
            )


def check_delayed_is_eager(model: nn.Module | None, layers: Iterable[str]) -> None:
    """Refuse delayed scaling in compiled code: its scales are updated outside of any graph.

    Args:
        model: the model, if there is one yet.
        layers: the layers under delayed scaling.

    Raises:
        ValueError: naming the compiled module.
    """
    regions = [] if model is None else compiled_regions(model, dict.fromkeys(layers))
    if regions:
        where = regions[0].name or "the model"
        raise ValueError(
            f"format 'fp8-delayed' must not be used in compiled code with Transformer Engine, and"
            f" {where} is compiled; take 'fp8-dynamic', or compile other modules"
        )


def check_device(device: str) -> None:
    """Refuse a run on a device that it does not multiply on.

    Args:
        device: the type of the device, e.g. "cpu".

    Raises:
        ValueError: naming both.
    """
    theirs = library().device
    if device != theirs:
        raise ValueError(
            f"backend 'transformer-engine' needs the model on a {theirs} device, got {device!r};"
            " set Trainer(accelerator='gpu'), or take backend='auto'"
        )
