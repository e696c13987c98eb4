"""Tensor parallelism: every rank's product is that of its shards, and no collective is added."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.two_ranks import run_on_two_ranks

FORMATS = ["fp8-dynamic", "fp8-rowwise", "fp8-block", "mxfp8", "e4m3", "high"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("sharded")
    run_on_two_ranks("tests.layers.sharded_ranks", directory, FORMATS)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("out", [48, 49])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plan", ["columns", "rows"])
def test_a_sharded_product_is_that_of_its_shards(
    ranks: list[dict[str, Any]], plan: str, format: str, out: int
) -> None:
    for told in ranks:
        found = told[f"{plan} {format} {out}"]
        for what in ("output", "grad_input", "grad_weight", "grad_bias"):
            torch.testing.assert_close(found[what], found[f"{what} by hand"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plan", ["plain", "sequence"])
def test_no_collective_is_added(ranks: list[dict[str, Any]], plan: str, format: str) -> None:
    for told in ranks:
        plain = told[f"{plan} block None"]["collectives"]
        assert plain
        assert told[f"{plan} block {format}"]["collectives"] == plain


@pytest.mark.parametrize("format", FORMATS)
def test_ranks_agree(ranks: list[dict[str, Any]], format: str) -> None:
    one, other = (told[f"plain block {format}"]["gradients"] for told in ranks)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("format", FORMATS)
def test_a_compiled_block_is_the_eager_one(ranks: list[dict[str, Any]], format: str) -> None:
    for told in ranks:
        eager, compiled = (told[f"{how} block {format}"] for how in ("plain", "compiled"))
        torch.testing.assert_close(compiled["gradients"], eager["gradients"])


def test_a_weight_that_all_ranks_have(ranks: list[dict[str, Any]]) -> None:
    """Rows of the input have scales of their own, so shards of the sequence cast as the whole."""
    for told in ranks:
        found = told["replicated"]
        torch.testing.assert_close(found["weight"], found["alone weight"])
        torch.testing.assert_close(found["bias"], found["alone bias"])
