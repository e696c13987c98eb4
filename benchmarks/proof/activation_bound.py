"""A device with little memory for activations: more than so many bytes, and it is out of memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class ActivationBound(L.Callback):
    """Counts what the training step keeps for backward, and refuses more than there is room for.

    Parameters and the batch itself are there anyway, and count for nothing. Blocks that compute
    their activations again keep their inputs alone, as checkpointing has it.

    Args:
        max_bytes: of distinct tensors; None only counts.
        of_first: so many times what the first step keeps is the bound, if given.
    """

    def __init__(self, max_bytes: int | None = None, *, of_first: float | None = None) -> None:
        self.of_first = of_first
        self.seen = SimpleNamespace(most=0, refused=0, limit=max_bytes)
        """The most bytes that a step has kept, how many times there was no room, and what room
        there is. In an object of its own: a replay puts back the plain attributes of callbacks."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step: Any = pl_module.training_step
        parameters = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}

        def bounded(*args: Any, **kwargs: Any) -> Any:
            batch = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            aside = parameters | {tensor.untyped_storage().data_ptr() for tensor in batch}
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in aside:
                    kept[storage.data_ptr()] = storage.nbytes()
                total = sum(kept.values())
                if self.seen.limit is not None and total > self.seen.limit:
                    self.seen.refused += 1
                    raise torch.OutOfMemoryError(f"no room for {total} bytes of activations")
                return tensor.detach()  # itself would be a cycle, until a backward comes

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = step(*args, **kwargs)
            self.seen.most = max(self.seen.most, sum(kept.values()))
            if self.of_first is not None and self.seen.limit is None:
                self.seen.limit = int(self.of_first * self.seen.most)
            return output

        pl_module.training_step = bounded  # pyright: ignore[reportAttributeAccessIssue]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del vars(pl_module)["training_step"]
