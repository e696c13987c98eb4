"""Ranks that are slow, die or cannot write; runs that go on over another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import read_events
from tests.callbacks.fallback.test_precision_fallback import LAYER
from tests.plugins.rank_faults import ASKED, CHECKPOINT, STEPS
from tests.two_ranks import run_on_ranks

PROGRAM = "tests.plugins.rank_faults"


def ranks(directory: Path, *names: str, world: int = 2) -> list[dict[str, Any]]:
    """What each rank tells of some runs."""
    directory.mkdir(exist_ok=True)
    codes = run_on_ranks(world, PROGRAM, directory, list(names))
    assert codes == [0] * world, (directory / "log0").read_text()[-4000:]
    files = [directory / f"rank{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two ranks to which nothing happens but its fault."""
    directory = tmp_path_factory.mktemp("sound")
    one, other = (told["sound"] for told in ranks(directory, "sound"))
    assert_alike(one, other)
    return directory / "sound", one


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    for what in ("formats", "changes", "phase", "failed_at", "step"):
        assert one[what] == other[what], what
    for what in ("weights", "history"):
        assert one[what].keys() == other[what].keys()
        assert all(torch.equal(one[what][name], other[what][name]) for name in one[what]), what


@pytest.mark.slow
def test_a_rank_that_cannot_write_goes_on(tmp_path: Path) -> None:
    one, other = (told["disk 0"] for told in ranks(tmp_path, "disk 0"))
    assert_alike(one, other)
    assert one["formats"][LAYER] == "fp32"
    assert one["failed_at"] is None


@pytest.mark.slow
def test_the_fault_is_found(sound: tuple[Path, dict[str, Any]]) -> None:
    (demotion,) = read_events(sound[0], kinds=["demote"])
    assert (demotion.step, demotion.layers) == (ASKED, (LAYER,))
    assert sound[1]["phase"] == "probation"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["straggler", "disk 0", "disk 1"])
def test_a_rank_that_is_slow_or_cannot_write_changes_nothing(
    name: str, sound: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Neither the verdict nor a weight: the rank goes on, and nobody waits for its records."""
    for told in ranks(tmp_path, name):
        assert_alike(told[name], sound[1])


def test_a_rank_that_dies_stops_the_others_and_leaves_readable_records(tmp_path: Path) -> None:
    left, dead = run_on_ranks(2, PROGRAM, tmp_path, ["dies"], timeout=60)
    assert dead == 9
    assert left not in (0, None), "the other rank goes on, or waits"
    # Which of torch's messages it is, of a closed or of a reset connection, is a matter of timing.
    assert "Check the logs of the remote worker" in (tmp_path / "log0").read_text()
    kinds = {event.kind for event in read_events(tmp_path / "dies")}
    assert {"started", "rehearsal"} <= kinds


def resumed(directory: Path, before: int, after: int) -> None:
    """A run of so many ranks goes on over another number of them."""
    first = ranks(directory, "sound", world=before)[0]["sound"]
    (directory / "sound" / CHECKPOINT).rename(directory / CHECKPOINT)
    for told in ranks(directory, "resumed", world=after):
        again = told["resumed"]
        assert again["formats"] == first["formats"]
        assert again["formats"][LAYER] == "fp32", "what the fallback has done is kept"
        assert again["phase"] == "probation"
        assert again["failed_at"] is None
        assert again["step"] == STEPS + 8
        assert again["history"].keys() == first["history"].keys()
        for name, history in first["history"].items():  # eight steps were pushed in, oldest out
            assert torch.equal(again["history"][name][:, 8:], history[:, :-8]), name


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 1)])
def test_other_numbers_of_ranks_go_on(before: int, after: int, tmp_path: Path) -> None:
    resumed(tmp_path, before, after)
