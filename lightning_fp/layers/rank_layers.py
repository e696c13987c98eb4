"""RankLayers: which layers the ranks have, and what they know of each of them together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_fp.layers.layer_names import fold_names
from lightning_fp.layers.switchable import SwitchableLayer


class RankLayers:
    """The ranks of a group, and their layers by name.

    Where all ranks have the same layers, rows of layers are reduced as they stand. Where some have
    others, as stages of a pipeline or experts by their own names, each puts its rows into a table
    of all names. Either way it is one collective.

    Args:
        group: of ranks; None: all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.differ = False
        """Whether some rank has other layers; known from `meet` on."""
        self.everywhere: tuple[str, ...] = ()
        """All names that some rank has; known from `meet` on."""
        self._compared: Collection[str] | None = None
        self._device = torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model and its table knows no group: it may be in another process."""
        return {**self.__dict__, "group": None, "_compared": None}

    @property
    def many(self) -> bool:
        """Whether other ranks take part."""
        return (
            dist.is_available()
            and dist.is_initialized()
            and self.group is not dist.GroupMember.NON_GROUP_MEMBER
            and dist.get_world_size(self.group) > 1
        )

    def meet(
        self, layers: Mapping[str, SwitchableLayer], device: torch.device, *, sized: bool = True
    ) -> None:
        """Hear of the layers of all ranks; a collective, or two where some have others.

        Args:
            layers: of this rank.
            device: where collectives run.
            sized: whether layers of one name must be of one size.

        Raises:
            ValueError: on all ranks, where a name stands for layers of several sizes.
        """
        self._device = device
        if not self.many:
            return
        sizes = {name: (each.out_features, each.in_features) for name, each in layers.items()}
        self.everywhere = tuple(sizes)
        self.differ = not self._alike([f"{name} {size}" for name, size in sizes.items()], device)
        if not self.differ:
            return
        ranks: list[dict[str, tuple[int, int]]] = [{}] * dist.get_world_size(self.group)
        dist.all_gather_object(ranks, sizes, group=self.group)
        self.everywhere = tuple(dict.fromkeys(name for each in ranks for name in each))
        for name in self.everywhere if sized else ():
            found = sorted({each[name] for each in ranks if name in each})
            if len(found) > 1:
                raise ValueError(
                    f"layer {name!r} must be the same on all ranks, got"
                    f" {' and '.join(f'{out} x {into}' for out, into in found)}; give layers that"
                    " differ names of their own, or hand over the ranks that share them:"
                    " PrecisionLoop(scale_group=...)"
                )

    def others(self, layers: Iterable[str]) -> str:
        """The layers that some rank has and this one not, many in one, for messages."""
        own = set(layers)
        return ", ".join(fold_names(name for name in self.everywhere if name not in own)) or "none"

    def check_judges(self, judges: Sequence[str], layers: Iterable[str], remedy: str) -> None:
        """Refuse what judges all layers together, where ranks have layers of their own.

        Args:
            judges: what does, and is on; by name.
            layers: of this rank.
            remedy: what to do, as the end of a sentence.

        Raises:
            ValueError: on all ranks.
        """
        if self.differ and judges:
            raise ValueError(
                f"{' and '.join(judges)} must be off where ranks have layers of their own (here"
                f" not: {self.others(layers)}): one rank cannot judge the layers of another;"
                f" {remedy}"
            )

    @torch.no_grad()
    def largest(self, rows: Tensor, names: Collection[str]) -> Tensor:
        """The largest value of each element over the ranks that have its layer; one collective.

        Args:
            rows: [layers, ...], 0 or more.
            names: of the layers; those that all ranks ask for, unless ranks `differ`.

        Returns:
            Same shape.

        Raises:
            ValueError: on all ranks, where one asks for others and no `meet` has told so.
        """
        if not self.many:
            return rows
        if not self.differ:
            if self._compared is not names:
                self._compare(names, rows.device)
            rows = rows.clone()
            dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=self.group)
            return rows
        places = {name: place for place, name in enumerate(self.everywhere)}
        device = rows.device if names else self._device
        own = torch.tensor([places[name] for name in names], dtype=torch.int64, device=device)
        table = torch.zeros(len(places), *rows.shape[1:], dtype=rows.dtype, device=device)
        table[own] = rows.to(device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=self.group)
        return table[own]

    def everywhere_true(self, here: Tensor) -> Tensor:
        """Whether it is so on all ranks; a collective.

        Args:
            here: bool scalar.
        """
        flag = here.to(self._device, torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return flag.bool().to(here.device)

    def _compare(self, names: Collection[str], device: torch.device) -> None:
        """Rows go by position, so all ranks must have the same."""
        if not self._alike(names, device):
            raise ValueError(
                "layers under delayed scaling must be the same on all ranks, got"
                f" {len(names)} on rank {dist.get_rank()} that are not those of the others; tell"
                " the table that ranks differ before the first step: precision_map.meet()"
            )
        self._compared = names

    def _alike(self, names: Iterable[str], device: torch.device) -> bool:
        """Whether all ranks say the same; a collective that waits for the device."""
        text = "\n".join(names)
        own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        most = torch.tensor([own, -own], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        largest, least = most.tolist()
        return largest == -least
