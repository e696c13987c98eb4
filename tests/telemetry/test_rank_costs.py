"""The costs on paper are what one of 1,024 ranks asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_fp.telemetry.rank_costs import (
    Traffic,
    agreement,
    incident_seconds,
    log_interval,
    look,
    per_step,
    scales,
    signals,
    snapshot_bytes,
    weight_gathers,
)
from tests import forked
from tests.telemetry.fake_ranks import LOG_EVERY, SHARDS

RUNS = ["delayed 1", "delayed 4", "dynamic 1"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("fake")
    rank = forked.start("tests.telemetry.fake_ranks", directory, log=directory / "log")
    rank.join(120)
    assert rank.exitcode == 0, (directory / "log").read_text()[-4000:]
    return torch.load(directory / "found.pt", weights_only=True)


def counted(step: tuple[int, int, int]) -> Traffic:
    return Traffic(collectives=step[0], sent=step[1], received=step[2])


@pytest.mark.parametrize("name", RUNS)
def test_what_a_step_asks_for(found: dict[str, Any], name: str) -> None:
    run = found[name]
    layers = run["layers"]
    ordinary = scales(layers) + signals()
    assert counted(run["steps"][1]) == ordinary
    delayed = layers if name.startswith("delayed") else 0
    logged = log_interval(layers, delayed=delayed, steps=LOG_EVERY)
    assert counted(run["steps"][2]) == ordinary + logged
    # In the first all ranks ask whether layers are the same, and what was seen before is dropped.
    once = [16, 12 * layers] if delayed else [16]
    first = counted(run["steps"][0])
    assert first.collectives == (ordinary + look(layers)).collectives + len(once)
    assert first.sent == (ordinary + look(layers)).sent + sum(once)


@pytest.mark.parametrize("name", RUNS)
def test_what_ranks_that_share_weights_ask_for(found: dict[str, Any], name: str) -> None:
    """The first step is gathered as it is; what is outside of the blocks stays until backward."""
    run = found[name]
    (of_blocks, in_blocks), (of_rest, in_rest) = run["blocks"], run["rest"]
    for step, low in enumerate((False, True, True)):
        how: Any = {"shards": SHARDS, "itemsize": 4}
        low_blocks, low_rest = (of_blocks, of_rest) if low else (0, 0)
        blocks = weight_gathers(
            low_blocks, of_blocks - low_blocks + in_blocks, modules=int(name[-1]), **how
        )
        rest = weight_gathers(low_rest, of_rest - low_rest + in_rest, modules=1, gathers=1, **how)
        assert counted(run["shared"][step]["gathered"]) == blocks + rest
        assert counted(run["shared"][step]["agreed"]) == agreement(run["layers"] if low else 0)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_snapshot_takes(found: dict[str, Any], name: str) -> None:
    """Of the weights alone, before the optimizer has any state; random states take 5 KB."""
    run = found[name]
    stated = snapshot_bytes(run["parameters"], shards=SHARDS, bytes_each=4)
    assert run["snapshot"] == pytest.approx(stated, abs=8192)


def test_a_step_on_average() -> None:
    mean = per_step(1000, delayed=1000, sample_every=16, log_every=50)
    assert mean.collectives == pytest.approx(2 + 2 / 16 + 5 / 50)
    assert mean.received == mean.sent


def test_an_incident_is_replays_and_copies() -> None:
    assert incident_seconds(2.0, replayed=12) == 24
    assert incident_seconds(2.0, replayed=12, copied_bytes=20e9) == 27
