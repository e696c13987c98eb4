"""Patterns of blocks against names as real models have them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.recipes.blocks import check_pattern, matching, stacks, thirds_of

LLAMA = [
    f"model.layers.{i}.{part}"
    for i in range(8)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head"]
MOE = [f"layers.{i}.experts.{e}.up" for i in range(3) for e in range(16)]
T5 = [f"{stack}.block.{i}.layer.0.q" for stack in ("encoder", "decoder") for i in range(4)]
MLP = ["body.0", "body.2", "head"]


def blocks(pattern: str, names: list[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in matching(pattern, names)})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks[0]", [0]),
        ("blocks[-1]", [7]),
        ("blocks[8]", []),
        ("blocks[-9]", []),
        ("blocks[1:-1]", [1, 2, 3, 4, 5, 6]),
        ("blocks[:]", list(range(8))),
        ("blocks[6:]", [6, 7]),
        ("blocks[:-20]", []),
        ("blocks[25%:75%]", [2, 3, 4, 5]),
        ("blocks[50%]", [4]),
        ("blocks[100%]", [7]),
        ("blocks[:12.5%]", [0]),
    ],
)
def test_slices(pattern: str, expected: list[int]) -> None:
    assert blocks(check_pattern(pattern), LLAMA) == expected


def test_a_glob_may_follow() -> None:
    found = matching("blocks[-1].mlp.*", LLAMA)
    assert found == ["model.layers.7.mlp.up_proj", "model.layers.7.mlp.down_proj"]
    assert matching("blocks[0].nothing", LLAMA) == []


def test_what_the_blocks_are() -> None:
    assert stacks(LLAMA) == {"model.layers": set(range(8))}
    assert stacks(MOE) == {"layers": {0, 1, 2}}  # experts are within blocks
    assert list(stacks(T5)) == ["encoder.block", "decoder.block"]
    assert matching("blocks[0]", T5) == ["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q"]
    assert matching("blocks[1]", MLP) == ["body.2"]  # the second there is, whatever its number
    assert stacks(["head", "fc"]) == {}
    assert matching("blocks[:]", ["head"]) == []


def test_globs_and_expressions_are_as_everywhere() -> None:
    assert matching("*.up_proj", LLAMA) == [f"model.layers.{i}.mlp.up_proj" for i in range(8)]
    assert matching("re:lm_.*", LLAMA) == ["lm_head"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "must be a text such as"),
        (3, "must be a text such as"),
        ("blocks[]", "must be 'blocks"),
        ("blocks[0", "must be 'blocks"),
        ("blocks[0:1:2]", "must be 'blocks"),
        ("blocks[x]", "must be 'blocks"),
        ("blocks[0]mlp", "must be 'blocks"),
        ("blocks[:120%]", "in 0 to 100"),
        ("re:(", "must be a regular expression"),
    ],
)
def test_what_is_no_pattern(pattern: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pattern(pattern)


@given(st.integers(1, 40), st.integers(-50, 50), st.integers(-50, 50))
def test_slices_are_pythons(count: int, start: int, stop: int) -> None:
    names = [f"m.h.{i}.fc" for i in range(count)]
    assert matching(f"blocks[{start}:{stop}]", names) == names[start:stop]


@pytest.mark.parametrize(
    ("count", "first", "middle", "last"),
    [(1, 1, 0, 0), (2, 1, 0, 1), (3, 1, 1, 1), (4, 1, 2, 1), (8, 2, 4, 2)],
)
def test_thirds_of_models_without_blocks(count: int, first: int, middle: int, last: int) -> None:
    names = [f"fc{i}" for i in range(count)]
    thirds = thirds_of(names)
    assert matching("blocks[0]", names, thirds) == names[:first]
    assert matching("blocks[50%]", names, thirds) == names[first : first + middle]
    assert matching("blocks[1:-1]", names, thirds) == names[first : first + middle]
    assert matching("blocks[-1]", names, thirds) == names[count - last :]
