from __future__ import annotations

import pytest
import torch

from lightning_fp import convert
from lightning_fp.layers import PrecisionMap
from lightning_fp.layers.batch_seeds import BatchSeeds
from lightning_fp.layers.conversion.convert import convert_into
from lightning_fp.layers.conversion.decide import Conversion
from lightning_fp.layers.format import linear_format
from lightning_fp.layers.rules import layer_rules
from tests.helper import TinyGPT


def drawn(seeds: BatchSeeds, count: int) -> list[int]:
    """What each of the next batches draws first."""
    numbers: list[int] = []
    for _ in range(count):
        seeds.next()
        numbers.append(int(torch.randint(2**31, ())))
    return numbers


def test_it_goes_on_from_its_state_whatever_was_drawn_meanwhile() -> None:
    torch.manual_seed(3)
    whole = drawn(BatchSeeds(), 6)
    assert len(set(whole)) == 6
    torch.manual_seed(3)
    seeds = BatchSeeds()
    first = drawn(seeds, 2)
    state = seeds.state_dict()
    torch.manual_seed(4)
    resumed = BatchSeeds()
    resumed.load_state_dict(state)
    assert first + drawn(resumed, 4) == whole


def test_another_seed_of_the_run_is_another_run() -> None:
    runs: list[list[int]] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runs.append(drawn(BatchSeeds(), 3))
    assert not set(runs[0]) & set(runs[1])


def table_of(format: str) -> PrecisionMap:
    table = PrecisionMap()
    chosen = linear_format(format)
    convert_into(table, TinyGPT(), Conversion(format=chosen, rules=layer_rules({"*": chosen})))
    return table


@pytest.mark.parametrize(
    ("format", "seeds"),
    [("e8m3-stochastic", True), ("e8m3", False), ("fp8-dynamic", False), ("bf16", False)],
)
def test_the_generator_is_left_alone_where_nothing_falls_by_chance(
    format: str, seeds: bool
) -> None:
    table = table_of(format)
    before = torch.get_rng_state()
    table.before_batch()
    assert torch.equal(torch.get_rng_state(), before) != seeds


def test_a_write_that_waits_counts_and_a_replay_does_not() -> None:
    table = table_of("bf16")
    table.set("*fc1", "e8m3-stochastic")
    before = torch.get_rng_state()
    with table.overridden({}):
        table.before_batch()
    assert torch.equal(torch.get_rng_state(), before)
    table.before_batch()
    assert not torch.equal(torch.get_rng_state(), before)


def test_another_model_is_another_run() -> None:
    """A plugin may be used again: after the same seed, its second run is the first."""
    table, chosen, numbers = PrecisionMap(), linear_format("e8m3-stochastic"), []
    for seed in (1, 1, 2):
        convert_into(table, TinyGPT(), Conversion(format=chosen, rules=layer_rules({"*": chosen})))
        torch.manual_seed(seed)
        table.before_batch()
        numbers.append(int(torch.randint(2**31, ())))
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_state_of_before_there_were_seeds_loads() -> None:
    table = table_of("e8m3-stochastic")
    state = table.state_dict()
    del state["seeds"]
    table.load_state_dict(state)
    table.before_batch()


def test_convert_alone_leaves_the_generator_to_its_loop() -> None:
    model = TinyGPT()
    convert(model, "e8m3-stochastic", {"*": "e8m3-stochastic"})
    outputs: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(torch.arange(8).view(1, 8)).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
