from __future__ import annotations

import pytest

from lightning_fp.study.sweep.grid import Cell, grid, parse_axes


def test_every_combination_once_and_seeds_last() -> None:
    cells = grid(["bf16", "dynamic"], [1e-3, 1e-2], range(2), {"clip": (1.0, 0)})
    assert len(cells) == len({cell.id for cell in cells}) == 16
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8
    assert {cell.format for cell in cells} == {"bf16", "fp8-dynamic"}


@pytest.mark.parametrize(
    "cell",
    [
        Cell(format="fp8-dynamic[grad_output=e4m3]", lr=1e-3, seed=0),
        Cell(format="e8m3", lr=0.1, seed=3, axes={"recipe": "a/b.yaml", "fallback": True}),
    ],
)
def test_cells_are_read_back_and_named_for_directories(cell: Cell) -> None:
    assert Cell.from_json(cell.to_json()) == cell
    assert not set(cell.id) & set("/\\[]: ")


def test_names_that_are_made_safe_stay_apart() -> None:
    one, other = (Cell(format="bf16", lr=1e-3, seed=0, axes={"recipe": r}) for r in ("a/b", "a_b"))
    assert one.id != other.id


@pytest.mark.parametrize(
    ("formats", "lrs", "seeds", "axes", "said"),
    [
        (["bf16", "bf16"], [1e-3], [0], {}, "--formats has 'bf16' twice"),
        (["dynamic", "fp8-dynamic"], [1e-3], [0], {}, "--formats has 'fp8-dynamic' twice"),
        (["fp9"], [1e-3], [0], {}, "fp9"),
        ([], [1e-3], [0], {}, "--formats must have at least one value"),
        (["bf16"], [0.0], [0], {}, "--lr must be finite and above 0"),
        (["bf16"], [float("nan")], [0], {}, "--lr must be finite and above 0"),
        (["bf16"], [1e-3], [0], {"clip": (1, 1)}, "--axis clip has 1 twice"),
    ],
)
def test_what_cannot_be_is_refused(formats, lrs, seeds, axes, said) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        grid(formats, lrs, seeds, axes)


@pytest.mark.parametrize("argument", ["clip", "clip=", "=1", "2x=1", "lr=1,2", "seeds=3"])
def test_axes_that_are_none(argument: str) -> None:
    with pytest.raises(ValueError, match="--axis"):
        parse_axes([argument])


def test_an_axis_given_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_axes(["clip=1", "clip=2"])
