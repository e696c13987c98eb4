"""Layer names of repeated blocks, many in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ in the numbers of their blocks, as one with ranges.

    >>> fold_names(["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "blocks.4.up"])
    ['blocks.0-1,4.up', 'blocks.0-1.down']
    >>> fold_names([f"blocks.{i}.experts.{j}" for i in range(3) for j in range(8)] + ["head"])
    ['blocks.0-2.experts.0-7', 'head']

    Args:
        names: as in `named_modules()`; the result stands for these and no others.

    Returns:
        In the order of the first of each.
    """
    folded = [tuple(name.split(".")) for name in dict.fromkeys(names)]
    for place in reversed(range(max(map(len, folded), default=0))):
        folded = _fold_at(place, folded)
    return [".".join(parts) for parts in folded]


def _fold_at(place: int, names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Fold the numbers at one place of names that are alike in all others."""
    numbers: dict[tuple[str, ...], list[int]] = {}
    for parts in names:
        if place < len(parts) and parts[place].isdecimal():
            numbers.setdefault(_with(parts, place, ""), []).append(int(parts[place]))
    done: set[tuple[str, ...]] = set()
    folded: list[tuple[str, ...]] = []
    for parts in names:
        alike = _with(parts, place, "") if place < len(parts) else parts
        if place >= len(parts) or not parts[place].isdecimal():
            folded.append(parts)
        elif alike not in done:
            done.add(alike)
            folded.append(_with(parts, place, _ranges(sorted(numbers[alike]))))
    return folded


def _with(parts: tuple[str, ...], place: int, text: str) -> tuple[str, ...]:
    return (*parts[:place], text, *parts[place + 1 :])


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
