"""Before a run: the ranks hear of each other's layers."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from lightning_fp.layers import PrecisionMap
from lightning_fp.layers.rank_layers import RankLayers
from lightning_fp.loop.parts import PartOptions
from lightning_fp.rank_group import current_group


def meet(
    table: PrecisionMap, sharing: ProcessGroup | None, options: PartOptions, device: torch.device
) -> RankLayers:
    """Hear of the layers that other ranks have; a collective.

    Args:
        table: of this rank.
        sharing: the ranks that share scales; None: all that train.
        options: what is on.
        device: where collectives run.

    Returns:
        All ranks that train, and whether their layers differ.

    Raises:
        ValueError: where ranks have layers of their own, and something is on that acts on all.
    """
    table.meet(sharing or current_group())
    everyone = table.scale_history.ranks
    if sharing is not None:
        everyone = RankLayers(current_group())
        everyone.meet(table.layers, device, sized=False)
    on = {
        "fallback": options.watch,
        "monitor": options.casts,
        "parity": options.parity,
        "stability": options.stability,
        "recipe": options.recipe,
    }
    named = [name for name, each in on.items() if each is not None]
    off = ", ".join(f"{name}={'None' if name == 'recipe' else False}" for name in named)
    everyone.check_judges(named, table.layers, f"give PrecisionLoop({off})")
    return everyone
