"""Patterns that speak of a model's blocks: `blocks[0]`, `blocks[1:-1]`, `blocks[25%:75%].mlp.*`.

A recipe is written before anybody knows how the model names its layers, or how many it has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_fp.layers.rules import compile_pattern
from lightning_fp.shown import shown

_END = r"(?:-?\d+|\d+(?:\.\d+)?%)"
_SELECTOR = re.compile(
    rf"blocks\[(?:(?P<one>{_END})|(?P<start>{_END})?:(?P<stop>{_END})?)\](?:\.(?P<rest>.+))?"
)


FEW = 4
"""Of fewer blocks a recipe that speaks of the first, the middle and the last makes little sense."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What `blocks[...]` counts in a model."""

    stacks: Mapping[str, Sequence[int]]
    """The numbers of the blocks, ascending, by what stands before them."""

    places: Mapping[str, tuple[str, int, str]]
    """Of each layer within: its stack, its block's number, and what a glob is over."""


def check_pattern(pattern: object) -> str:
    """The pattern, if it is one.

    Args:
        pattern: a glob over the whole layer name, a regular expression after "re:", or blocks.

    Raises:
        ValueError: if it is none of these.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"layer pattern must be a text such as '*' or 'blocks[0]', got {shown(pattern)}"
        )
    if not pattern.startswith("blocks["):
        compile_pattern(pattern)
        return pattern
    found = _SELECTOR.fullmatch(pattern)
    if found is None:
        raise ValueError(
            f"layer pattern must be 'blocks[i]' or 'blocks[i:j]' with integers or per cent, then"
            f" perhaps '.' and a glob, got {shown(pattern)}; e.g. 'blocks[1:-1].mlp.*'"
        )
    for end in ("one", "start", "stop"):
        if (found[end] or "").endswith("%") and not 0 <= float(found[end][:-1]) <= 100:
            raise ValueError(f"layer pattern: per cent must be in 0 to 100, got {shown(pattern)}")
    return pattern


def matching(pattern: str, names: Sequence[str], blocks: Blocks | None = None) -> list[str]:
    """The layers that a recipe's pattern matches.

    >>> names = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    >>> matching("blocks[-1]", names), matching("blocks[:].up", names)
    (['blocks.1.up', 'blocks.1.down'], ['blocks.0.up', 'blocks.1.up'])

    Args:
        pattern: see `check_pattern`.
        names: the layers, in the order of the model.
        blocks: what `blocks[...]` counts; by default `blocks_of` these names.
    """
    found = _SELECTOR.fullmatch(pattern)
    if found is None:
        compiled = compile_pattern(pattern)
        return [name for name in names if compiled.fullmatch(name)]
    rest = compile_pattern(found["rest"] or "*")
    blocks = blocks or blocks_of(names)
    chosen: dict[str, set[int]] = {}
    for stack, ordered in blocks.stacks.items():
        count = len(ordered)
        if found["one"] is not None:
            at = _place(found["one"], count)
            at = min(at, count - 1) if found["one"].endswith("%") else at
            chosen[stack] = set(ordered[at : at + 1]) if at >= 0 else set()
        else:
            start = 0 if found["start"] is None else max(0, _place(found["start"], count))
            stop = count if found["stop"] is None else max(0, _place(found["stop"], count))
            chosen[stack] = set(ordered[start:stop])
    return [
        name
        for name in names
        if (at := blocks.places.get(name)) is not None
        and at[1] in chosen.get(at[0], ())
        and rest.fullmatch(at[2])
    ]


def blocks_of(names: Collection[str]) -> Blocks:
    """The numbered blocks of a model, see `stacks`."""
    found = stacks(names)
    places = {name: at for name in names if (at := _block(name)) is not None and at[0] in found}
    return Blocks(stacks={stack: sorted(found[stack]) for stack in found}, places=places)


def thirds_of(names: Sequence[str]) -> Blocks:
    """Blocks for a model that has none: the first third of its layers, the middle, the last.

    >>> thirds = thirds_of(["fc1", "fc2", "fc3", "fc4"])
    >>> matching("blocks[1:-1]", list(thirds.places), thirds)
    ['fc2', 'fc3']

    Args:
        names: the layers, in the order in which they run; of one or two, none is in the middle.
    """
    end = max(1, len(names) // 3)
    part = [0 if i < end else 2 if i >= len(names) - end else 1 for i in range(len(names))]
    places = {name: ("", number, name) for name, number in zip(names, part, strict=True)}
    return Blocks(stacks={"": (0, 1, 2)}, places=places)


def stacks(names: Collection[str]) -> dict[str, set[int]]:
    """The model's stacks of blocks: the numbers of the blocks by what stands before them.

    Of all modules whose parts are numbered, outermost first, those with the most parts: the
    longest stack, or several of one length, as an encoder's and a decoder's.

    >>> stacks(["encoder.layer.0.fc", "encoder.layer.1.fc", "classifier"])
    {'encoder.layer': {0, 1}}

    Args:
        names: the layers.
    """
    families: dict[str, set[int]] = {}
    for name in names:
        if (at := _block(name)) is not None:
            families.setdefault(at[0], set()).add(at[1])
    longest = max(map(len, families.values()), default=0)
    return {stack: numbers for stack, numbers in families.items() if len(numbers) == longest}


def _block(name: str) -> tuple[str, int, str] | None:
    """What stands before a name's first number, the number, and what follows it."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and index:
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return None


def _place(end: str, count: int) -> int:
    """An end of a slice as an index from the front; per cent are rounded down."""
    if end.endswith("%"):
        return int(float(end[:-1]) * count / 100)
    return int(end) + count if end.startswith("-") else int(end)
