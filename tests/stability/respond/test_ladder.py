"""The ladder: one rung up is safer, runs here, and keeps what the user has chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_fp import LinearFormat, PrecisionMap, convert
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.layers import linear_format
from lightning_fp.layers.format import NAMED_FORMATS
from lightning_fp.stability.respond.ladder import LADDER, rungs_above

HIGH = NAMED_FORMATS["bf16"]


def table_of(backend: str = "auto", width: int = 32) -> PrecisionMap:
    model = nn.Sequential(nn.Linear(width, width))
    table = convert(model, "fp8-dynamic", {"*": "fp8-dynamic"}, backend=backend).precision_map
    assert table is not None
    return table


def climb(format: str | LinearFormat, table: PrecisionMap | None = None) -> list[str]:
    table = table_of() if table is None else table
    return [f.name for f in rungs_above(linear_format(format), HIGH, table, table.layers["0"])]


@pytest.mark.parametrize("index", range(len(LADDER)))
def test_every_rung_has_those_above_it(index: int) -> None:
    assert climb(LADDER[index]) == [*LADDER[index + 1 :], "bf16"]


@pytest.mark.parametrize("name", ["high", "fp32", "bf16", "fp16"])
def test_nothing_is_above_high_precision(name: str) -> None:
    assert climb(name) == []


@pytest.mark.parametrize("name", ["e8m3", "e4m3", "e5m2[rounding=truncate]"])
def test_simulated_formats_are_not_on_the_ladder(name: str) -> None:
    assert climb(name) == ["bf16"]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_neither_are_torchao_configs(recipe: str) -> None:
    config = import_float8().Float8LinearConfig.from_recipe_name(recipe)
    table = table_of()
    assert rungs_above(linear_format(config), HIGH, table, table.layers["0"]) == [HIGH]


def test_operands_chosen_by_the_user_stay_while_the_scale_is_per_tensor() -> None:
    assert climb(LinearFormat("delayed", input="e5m2")) == [
        "fp8-dynamic[input=e5m2]",
        "fp8-rowwise",
        "fp8-rowwise-gw-hp",
        "bf16",
    ]


@pytest.mark.parametrize("scaling", ["delayed", "dynamic"])
def test_a_gradient_in_high_precision_stays_there(scaling: str) -> None:
    above = climb(f"fp8-{scaling}[grad_weight=high]")
    dynamic = ["fp8-dynamic[grad_weight=high]"] if scaling == "delayed" else []
    assert above == [*dynamic, "fp8-rowwise-gw-hp", "bf16"]


@pytest.mark.parametrize("name", ["fp8-block", "mxfp8", "fp8-block[grad_output=e5m2]"])
def test_blocks_have_rungs_of_their_own(name: str) -> None:
    high = linear_format(name.replace("]", ",grad_weight=high]")) if "[" in name else None
    middle = f"{name}[grad_weight=high]" if high is None else high.name
    assert climb(name) == [middle, "bf16"]
    assert climb(middle) == ["bf16"]


def test_a_backend_without_rowwise_scales_has_no_such_rungs() -> None:
    table = table_of("native")
    assert climb("fp8-delayed", table) == ["fp8-dynamic", "bf16"]
    assert climb("fp8-dynamic", table) == ["bf16"]


def test_a_shape_that_the_hardware_refuses_has_only_high_precision_above() -> None:
    table = table_of(width=20)
    table.known.cuda_fp8 = True  # as it is set on FP8 hardware; nothing runs here
    assert climb("fp8-delayed", table) == ["bf16"]


EIGHT_BITS = st.sampled_from(["e4m3", "e5m2"])
SCALED = (
    st.builds(
        LinearFormat,
        st.sampled_from(["dynamic", "delayed"]),
        input=EIGHT_BITS,
        weight=EIGHT_BITS,
        grad_output=EIGHT_BITS,
        grad_weight=st.sampled_from(["fp8", "high"]),
    )
    | st.builds(
        LinearFormat,
        st.just("dynamic"),
        st.just("row"),
        grad_output=EIGHT_BITS,
        grad_weight=st.sampled_from(["fp8", "high"]),
        power_of_two=st.booleans(),
    )
    | st.builds(
        LinearFormat,
        st.just("dynamic"),
        st.sampled_from(["block", "mx"]),
        grad_output=EIGHT_BITS,
        grad_weight=st.sampled_from(["fp8", "high"]),
        power_of_two=st.just(True),
    )
)


@settings(max_examples=40, deadline=None)
@given(SCALED)
def test_climbing_ends_in_high_precision_and_never_comes_back(format: LinearFormat) -> None:
    table = table_of()
    layer, path = table.layers["0"], [format]
    while above := rungs_above(path[-1], HIGH, table, layer):
        assert above[-1] == HIGH
        assert len(set(above)) == len(above)
        path.append(above[0])
    assert path[-1] == HIGH
    assert len(set(path)) == len(path) <= len(LADDER) + 1
    safe = [f.grad_weight == "high" or f == HIGH for f in path]
    assert safe == sorted(safe)


@settings(max_examples=20, deadline=None)
@given(SCALED)
def test_every_rung_can_be_written_and_run(format: LinearFormat) -> None:
    table = table_of()
    for rung in rungs_above(format, HIGH, table, table.layers["0"]):
        table.set("0", rung)
        table.apply()
        model = table.model
        assert model is not None
        x = torch.randn(4, 32, requires_grad=True)
        model(x).sum().backward()
        assert torch.isfinite(x.grad).all()
