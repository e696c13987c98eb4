"""A module's parameters and buffers as a tree, put back in place.

In place, because optimizers, compiled code and the strategy's wrappers hold these very tensors. Not
by `state_dict`, which leaves out buffers that are not persistent, though a step reads them as well,
and runs the hooks of whoever wants a say in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from lightning_fp.stability.keep.state_tree import TensorCollector, Tree, TreeRestorer


def collect_module(module: nn.Module, collected: TensorCollector) -> Tree:
    """Parameters and buffers, also buffers that are not persistent or None."""
    slots = [[name, collected.tree(tensor)] for name, tensor in _tensors(module)]
    return ("module", slots)


def rebuild_module(
    part: str, module: nn.Module, tree: Tree, rebuilt: TreeRestorer
) -> Callable[[], object]:
    """Prepare to put them back: into the tensors that are there, or, of buffers, in new ones.

    Returns:
        What puts in the new ones; nothing is changed before.

    Raises:
        ValueError: if a parameter is not of the shape or dtype it had.
    """
    now, owners = dict(_tensors(module)), dict(module.named_modules())
    bindings: list[tuple[dict[str, Any], str, Tensor | None]] = []
    for name, slot in tree[1]:
        tensor = now.get(name)
        if tensor is not None and rebuilt.fill(slot, tensor):
            continue
        if tensor is None and slot == ("value", None):
            continue
        path, _, key = name.rpartition(".")
        owner = owners.get(path)
        if owner is None or key not in owner._buffers:
            raise ValueError(
                f"{name!r} of part {part!r} must be as it was in the snapshot, got"
                f" {'none' if tensor is None else f'{tensor.dtype} {list(tensor.shape)}'}; take a"
                " new snapshot after changing the model"
            )
        bindings.append((owner._buffers, key, rebuilt.value(slot)))

    def put_back() -> None:
        for buffers, key, value in bindings:
            buffers[key] = value

    return put_back


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()  # after an evaluation it may have its parameters gathered
    for path, owner in module.named_modules():
        for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or not (tensor.is_meta or is_lazy(tensor)):
                yield f"{path}.{key}" if path else key, tensor
