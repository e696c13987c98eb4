"""LinearFormat: names, what they stand for, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp import LinearFormat
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.layers import linear_format
from lightning_fp.layers.format import HIGH_PRECISION, NAMED_FORMATS

EIGHT_BITS = st.sampled_from(["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"])
SIMULATED_NAMES = (
    "e8m3-truncate",
    "e8m7-stochastic",
    "e4m5-scaled",
    "e4m3-scaled-stochastic",
)
ANY_FORMAT = st.sampled_from(["fp32", "bf16", "fp16", "e4m3", "e5m2", "e2m1", "e3m2", "e8m3"])
SCALED = st.builds(
    LinearFormat,
    st.just("dynamic"),
    st.sampled_from(["tensor", "row", "block"]),
    input=EIGHT_BITS,
    weight=EIGHT_BITS,
    grad_output=EIGHT_BITS,
    grad_weight=st.sampled_from(["fp8", "high"]),
    power_of_two=st.booleans(),
)
MX = st.builds(
    LinearFormat,
    st.just("dynamic"),
    st.just("mx"),
    input=EIGHT_BITS,
    grad_output=EIGHT_BITS,
    grad_weight=st.sampled_from(["fp8", "high"]),
    power_of_two=st.just(True),
)
DELAYED = st.builds(
    LinearFormat,
    st.just("delayed"),
    input=EIGHT_BITS,
    weight=EIGHT_BITS,
    grad_output=EIGHT_BITS,
    grad_weight=st.sampled_from(["fp8", "high"]),
)
SIMULATED = st.builds(
    LinearFormat,
    st.just("none"),
    input=ANY_FORMAT,
    weight=ANY_FORMAT,
    grad_output=ANY_FORMAT,
    grad_weight=st.sampled_from(["fp8", "high"]),
    rounding=st.sampled_from(["nearest", "truncate", "stochastic"]),
)
SIMULATED_SCALED = st.builds(
    LinearFormat,
    st.just("dynamic"),
    input=st.sampled_from(["e4m3", "e5m2", "fp16", "e2m1", "e7m7"]),
    weight=st.sampled_from(["e4m3", "e5m2", "fp16", "e2m1", "e7m7"]),
    grad_output=EIGHT_BITS,
    rounding=st.sampled_from(["nearest", "truncate", "stochastic"]),
    power_of_two=st.booleans(),
)


@given(st.one_of(SCALED, MX, DELAYED, SIMULATED, SIMULATED_SCALED))
def test_a_name_reads_back_to_its_format(format: LinearFormat) -> None:
    assert linear_format(format.name) == format
    assert linear_format(format) is format
    assert repr(format) == f"LinearFormat({format.name!r})"


@pytest.mark.parametrize("name", [*NAMED_FORMATS, "e8m3", "e5m2", "e2m1", *SIMULATED_NAMES])
def test_names_are_canonical(name: str) -> None:
    assert linear_format(name).name == name


def test_aliases_are_the_format_they_mean() -> None:
    assert linear_format("e8m7") == linear_format("bf16")
    assert linear_format("e5m10") == linear_format("fp16")


def test_kinds() -> None:
    for name in NAMED_FORMATS:
        format = linear_format(name)
        assert format.is_high_precision == (name in HIGH_PRECISION)
        assert format.is_fp8 == name.startswith(("fp8-", "mxfp8", "nvfp4"))
    for name in ("e8m3", *SIMULATED_NAMES):
        simulated = linear_format(name)
        assert simulated.is_simulated
        assert not simulated.is_high_precision
        assert not simulated.is_fp8
    assert linear_format("e8m3-truncate") == linear_format("e8m3[rounding=truncate]")
    assert linear_format("e4m3-scaled") == linear_format("fp8-dynamic[grad_output=e4m3]")
    assert linear_format("e4m3-scaled").is_fp8
    assert not linear_format("bf16[input=e8m3]").is_high_precision


def test_the_documented_formats() -> None:
    assert linear_format("fp8-dynamic") == LinearFormat("dynamic", "tensor")
    rowwise = LinearFormat("dynamic", "row", "e4m3", "e4m3", "e4m3", power_of_two=True)
    assert linear_format("fp8-rowwise") == rowwise
    assert linear_format("fp8-rowwise-gw-hp") == dataclasses.replace(rowwise, grad_weight="high")
    assert linear_format("fp8-block") == LinearFormat("dynamic", "block", "e4m3", "e4m3", "e4m3")
    mx = LinearFormat("dynamic", "mx", "e4m3", "e4m3", "e4m3", power_of_two=True)
    assert linear_format("mxfp8") == mx


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("tensorwise", "fp8-dynamic"),
        ("rowwise", "fp8-rowwise"),
        ("rowwise_with_gw_hp", "fp8-rowwise-gw-hp"),
    ],
)
def test_torchao_configs(recipe: str, name: str) -> None:
    config = import_float8().Float8LinearConfig.from_recipe_name(recipe)
    format = linear_format(config)
    assert format.torchao is config
    assert dataclasses.replace(format, torchao=None) == linear_format(name)
    assert format.name == name.replace("fp8-", "torchao-")


def test_a_torchao_config_that_does_not_scale_is_refused() -> None:
    float8 = import_float8()
    disabled = float8.CastConfig(scaling_type=float8.ScalingType.DISABLED)
    config = float8.Float8LinearConfig(
        cast_config_input=disabled,
        cast_config_weight=float8.CastConfig(scaling_type=float8.ScalingType.DISABLED),
        cast_config_grad_output=float8.CastConfig(scaling_type=float8.ScalingType.DISABLED),
    )
    with pytest.raises(ValueError, match=r"cast_config_input must scale the input, got DISABLED"):
        linear_format(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling": "static"}, "scaling must be one of none, dynamic, delayed, got 'static'"),
        ({"granularity": "rows"}, "granularity must be one of tensor, row, block, mx, nv, got"),
        ({"grad_weight": "bf16"}, "grad_weight must be one of fp8, high, got 'bf16'"),
        (
            {"scaling": "none", "rounding": "up"},
            "rounding must be one of nearest, truncate, stochastic, got",
        ),
        (
            {"scaling": "delayed", "granularity": "row"},
            "granularity must be 'tensor' with delayed scaling, got 'row'",
        ),
        (
            {"scaling": "delayed", "granularity": "block"},
            "granularity must be 'tensor' with delayed scaling, got 'block'",
        ),
        ({"granularity": "row", "rounding": "truncate"}, "rounding must be 'nearest' with scaling"),
        ({"scaling": "delayed", "rounding": "stochastic"}, "rounding must be 'nearest' with"),
        ({"granularity": "row", "input": "e4m5"}, "input must be an 8-bit format"),
        ({"granularity": "mx"}, "power_of_two must be True with granularity 'mx', got False"),
        ({"input": "bf16"}, "input must be an 8-bit format (e4m3, e5m2, e4m3fnuz, e5m2fnuz)"),
        ({"grad_output": "e8m3"}, "grad_output must be an 8-bit format"),
        ({"weight": "int8"}, "number format must be one of fp32, bf16, fp16, e4m3"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearFormat(**fields)  # pyright: ignore


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fp8-dynamc", "format must be one of high, fp32, bf16, fp16, fp8-dynamic"),
        ("fp8", "format must be one of"),
        ("", "format must be one of"),
        ("e9m3", "number format must be one of"),
        ("fp8-dynamic[inptu=e5m2]", "format 'fp8-dynamic[inptu=e5m2]': field must be one of"),
        ("fp8-dynamic[input=e9m9]", "number format must be one of"),
        (8, "format must be a name, a LinearFormat, a torchao Float8LinearConfig or a"),
        (None, "got None of type NoneType"),
    ],
)
def test_unknown_formats_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_format(value)  # pyright: ignore


@pytest.mark.parametrize("value", ["maybe", "True", "1"])
def test_switches_are_true_or_false(value: str) -> None:
    with pytest.raises(ValueError, match="power_of_two must be one of true, false, got"):
        linear_format(f"fp8-rowwise[power_of_two={value}]")
    assert not linear_format("fp8-rowwise[power_of_two=false]").power_of_two
