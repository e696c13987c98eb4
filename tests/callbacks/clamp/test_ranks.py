"""Two ranks report what one rank does over the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_loss, read_statistics
from tests.callbacks.clamp.ranks import train
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks("tests.callbacks.clamp.ranks", directory)
    return directory


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["step"], row["layer"], row["operand"]


def test_two_ranks_are_one(directory: Path, tmp_path: Path) -> None:
    train(tmp_path, 1)
    one, two = (
        {key(row): row for row in read_statistics(path).to_pylist()}
        for path in (tmp_path, directory / "two")
    )
    assert one.keys() == two.keys()
    assert len(one) == 2 * 2 * 4
    for name, row in one.items():
        other = two[name]
        if row["step"] == 4:
            continue  # the first delayed scales are those of each rank's own tensors
        if row["operand"] == "weight":  # every rank casts it
            for column in ("numel", "nonzero", "magnitude", "signal"):
                other[column] /= 2
        for column, value in row.items():
            same = value == other[column] or value == pytest.approx(other[column], rel=1e-4)
            assert same, (name, column)
    clamped = [row["clamped_mass"] for row in one.values() if row["operand"] == "input"]
    assert max(clamped) > 0
    one, two = read_loss(tmp_path), read_loss(directory / "two")
    assert one.steps.tolist() == two.steps.tolist() == list(range(1, 9))
    # The model sums its loss, in bf16: the mean over two ranks is half of the whole batch's.
    assert (two.values * 2).tolist() == pytest.approx(one.values.tolist(), rel=2e-2)


def test_a_rank_that_fails_takes_the_others_along(directory: Path) -> None:
    ranks = [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]
    assert [rank["failed"] for rank in ranks] == [True, False]
    assert all(rank["steps"] == 8 and not rank["collects"] for rank in ranks)
