"""Names of repeated blocks, folded."""

from __future__ import annotations

import doctest
import itertools

from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.layers import layer_names
from lightning_fp.layers.layer_names import fold_names


def unfolded(name: str) -> set[str]:
    """What a folded name stands for."""
    parts: list[list[str]] = []
    for part in name.split("."):
        numbers: list[str] = []
        for run in part.split(","):
            first, _, last = run.partition("-")
            if first.isdecimal() and (not last or last.isdecimal()):
                numbers += map(str, range(int(first), int(last or first) + 1))
        parts.append(numbers or [part])
    return {".".join(choice) for choice in itertools.product(*parts)}


NAMES = st.lists(
    st.builds(
        lambda block, expert, end: f"blocks.{block}.{expert}{end}",
        st.integers(0, 5),
        st.sampled_from(["experts.0.", "experts.1.", "experts.2.", ""]),
        st.sampled_from(["up", "down", "up-2"]),
    ),
    unique=True,
)


@given(NAMES)
def test_it_stands_for_these_names_and_no_others(names: list[str]) -> None:
    folded = [unfolded(name) for name in fold_names(names)]
    assert set().union(*folded) == set(names)
    assert sum(map(len, folded)) == len(names)


def test_a_transformer_is_a_few_names() -> None:
    names = [f"blocks.{i}.{end}" for i in range(12) for end in ("fc1", "fc2")]
    assert fold_names([*names, "head"]) == ["blocks.0-11.fc1", "blocks.0-11.fc2", "head"]
    assert fold_names([]) == []
    assert fold_names(["", "a", "a"]) == ["", "a"]


def test_examples() -> None:
    assert doctest.testmod(layer_names).failed == 0
