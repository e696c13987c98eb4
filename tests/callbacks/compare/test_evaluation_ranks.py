"""Two ranks measure what one does over the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fp.records import read_evaluation, read_steps
from tests.callbacks.compare.evaluation_ranks import Evaluated, train
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks("tests.callbacks.compare.evaluation_ranks", directory)
    return directory


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_are_one(directory: Path, tmp_path: Path, strategy: str) -> None:
    one = train(tmp_path, Evaluated()).latest
    assert one is not None
    ranks = [torch.load(directory / f"rank{rank}.pt")[strategy] for rank in range(2)]
    assert ranks[0] == ranks[1]
    (row,) = read_evaluation(directory / strategy).to_pylist()
    assert row["loss"] == ranks[0]["loss"] == pytest.approx(one.loss, rel=1e-6)
    assert row["loss_high"] == pytest.approx(one.loss_high, rel=1e-6)
    assert row["loss"] != row["loss_high"]


def test_losses_and_norms_are_those_of_the_whole_batch(directory: Path) -> None:
    ddp, fsdp2 = (read_steps(directory / name) for name in ("ddp", "fsdp2"))
    assert ddp["step"].to_pylist() == fsdp2["step"].to_pylist() == [1, 2]
    for column in ("loss", "grad_norm"):
        assert ddp[column].to_pylist() == pytest.approx(fsdp2[column].to_pylist(), rel=1e-4)


def test_a_rank_that_fails_takes_the_others_along(directory: Path) -> None:
    ranks = [torch.load(directory / f"rank{rank}.pt")["silent"] for rank in range(2)]
    assert ranks == [None, None]
    assert len(read_evaluation(directory / "silent")) == 0
