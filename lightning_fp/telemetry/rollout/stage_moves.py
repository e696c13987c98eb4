"""What a stage does to the table: which layers it moves, and which it leaves to others.

Several hands write to the table: limits, demotions, `fp8-auto`, the user. A rollout that gave every
layer its stage's format would undo what they did for a reason. So a stage moves a layer only from
the format that the stage before had given it. The exception is the way to high precision, which is
safe for any layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.recipes import RolloutRecipe, StageFormats, formats_by_stage

Moves = dict[str, LinearFormat]
"""New formats by layer, in the order of the model."""


class StageMoves:
    """Gives layers the formats of stages, through the table as anybody.

    Args:
        recipe: the stages.
        owner: of the table, when it is filled.

    Raises:
        ValueError: see `follow`.
    """

    def __init__(self, recipe: RolloutRecipe, owner: TableOwner) -> None:
        self.owner = owner
        self.stages = follow(recipe, owner)
        self.skipped = frozenset(i for i, entry in enumerate(self.stages) if entry.skipped)
        """Indices of the stages that would change nothing."""
        self.changed_from: Mapping[str, str] | None = None
        """Where the recipe was changed while the run lay still: the formats it had before."""
        self._configured = owner.precision_map.configured()

    def begin(self, stage: int) -> None:
        """Between two steps, before anything is decided: what waits for this step is in force."""
        self.owner.boundary()
        before, self.changed_from = self.changed_from, None
        if before is not None:
            entry = self.stages[stage]
            moves, _ = self._plan(entry.formats, before)
            self.write(moves, f"rollout stage {entry.stage.name}: the recipe was changed")

    def plan(self, stage: int, before: int) -> tuple[Moves, list[str]]:
        """What is to be done to enter a stage.

        Args:
            stage: its index.
            before: the index of the stage that ends; negative where there is none.

        Returns:
            The new formats of the layers that get one, and the layers that are left as they are.
        """
        known = self.stages[before].formats if before >= 0 else self._configured
        return self._plan(self.stages[stage].formats, known)

    def _plan(
        self, wanted: Mapping[str, str], before: Mapping[str, str]
    ) -> tuple[Moves, list[str]]:
        """Only of what the rollout itself had seen to before.

        A layer that has another format now was changed by somebody else, who knows why, and may
        only go to high precision.
        """
        table = self.owner.precision_map
        moves: Moves = {}
        left: list[str] = []
        for name, layer in table.layers.items():
            if name not in wanted:  # an expert that somebody has named since
                continue
            now, format = layer.format, table.known.taken(layer, table.known[wanted[name]])
            if now == format:
                continue
            own = now == table.known.taken(layer, table.known[before[name]])
            if own or (format.is_high_precision and not now.is_high_precision):
                moves[name] = format
            elif before[name] != wanted[name]:
                left.append(name)
        return moves, left

    def write(self, moves: Mapping[str, LinearFormat], reason: str) -> None:
        """In force at once: what follows is measured in these formats."""
        table = self.owner.precision_map
        by_format: dict[LinearFormat, list[str]] = {}
        for name, format in moves.items():
            by_format.setdefault(format, []).append(name)
        for format, names in by_format.items():
            pattern = "|".join(map(re.escape, names))
            table.set(f"re:{pattern}", format, reason=reason, author="rollout")
        self.owner.boundary()


def follow(recipe: RolloutRecipe, owner: TableOwner) -> list[StageFormats]:
    """A recipe's formats by stage over the layers of a table.

    Args:
        recipe: the recipe.
        owner: of the table, when it is filled.

    Raises:
        ValueError: for a pattern that matches nothing, a layer that cannot run a stage's format,
            or where nothing can be moved.
    """
    table = owner.precision_map
    for pattern in (each for stage in recipe.stages for each in stage.layers):
        if not pattern.startswith("blocks["):
            table.set_apart(pattern)
    configured = table.configured()
    formats = {name: table.known[format] for name, format in configured.items()}
    low = [name for name, format in formats.items() if not format.is_high_precision]
    # Without a layer in FP8 it is FP16 that a recipe moves, between itself and BF16.
    high = (owner.base_format if low else owner.high_precision).name
    half = configured if owner.falls_back_whole else {}
    movable = low or [name for name, format in half.items() if format != high]
    if not movable:
        raise ValueError(
            f"recipe {recipe.name!r} has nothing to move: {type(owner).__name__} is configured to"
            " leave every layer in high precision; configure it with the formats that the run is"
            " to come to"
        )
    order = () if owner.report is None else owner.report.order
    stages = formats_by_stage(recipe, configured, high=high, movable=movable, order=order)
    for entry in stages:
        for name in entry.changes:
            format = table.known[entry.formats[name]]
            if not table.known.can_run(table.layers[name], format):
                raise ValueError(f"{entry.stage}: layer {name!r} cannot run {format.name!r} here")
        if not low and len(set(entry.formats.values())) > 1:
            raise ValueError(
                f"{entry.stage}: layers must all have one format under {type(owner).__name__},"
                " whose base changes with them; write '*'"
            )
    return stages
