"""Sharded over two ranks, a model is handed over and exported as if it were whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_fp.rl import export_model, quantised_state_dict
from lightning_fp.rl.engine.checkpoints import weights_in
from lightning_fp.rl.engine.export import export_weights
from tests.rl.engine.reader import read_directory
from tests.rl.engine.shard_ranks import model
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards")
    run_on_two_ranks("tests.rl.engine.shard_ranks", made)
    return made


@pytest.mark.parametrize("format", ["fp8-block", "fp8-dynamic", "fp8-rowwise"])
def test_every_rank_is_handed_the_whole(directory: Path, format: str) -> None:
    whole = list(quantised_state_dict(model(format)))
    for rank in range(2):
        found = torch.load(directory / f"rank{rank}.pt")["handed"][format]
        for (name, tensor, scale), (other, found_tensor, found_scale) in zip(
            whole, found, strict=True
        ):
            assert name == other
            assert torch.equal(tensor.view(torch.uint8), found_tensor.view(torch.uint8))
            assert (scale is None) == (found_scale is None)
            assert scale is None or torch.equal(scale, found_scale)


def test_a_sharded_checkpoint_is_exported_as_the_whole_model(
    directory: Path, tmp_path: Path
) -> None:
    formats = {"0": "fp8-block", "2": "fp8-block", "3": "bf16"}
    export_weights(weights_in(directory / "sharded", formats), tmp_path / "shards", "hf-fp8-block")
    export_model(model("fp8-block"), tmp_path / "whole", "hf-fp8-block")
    shards, whole = (read_directory(tmp_path / name) for name in ("shards", "whole"))
    assert shards.keys() == whole.keys()
    for name, array in whole.items():
        assert np.array_equal(shards[name].view(np.uint8), array.view(np.uint8))


def test_causes_that_one_rank_knows_are_told_to_all(directory: Path) -> None:
    first, second = (torch.load(directory / f"rank{rank}.pt") for rank in range(2))
    assert first["causes"] == second["causes"]
    assert first["causes"]["staleness"] > 0.9
    assert first["stale"] == second["stale"] == 0.5
