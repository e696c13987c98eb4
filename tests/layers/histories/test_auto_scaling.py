"""fp8-auto moves layers by what their own history shows, and by the token budget."""

import pytest
import torch
from torch import nn

from lightning_fp import FP8Precision, recommend_scaling
from lightning_fp.layers import AutoScaling, Conversion, PrecisionMap, convert_into, linear_format
from lightning_fp.layers.histories.auto_scaling import AutoScalingState


def auto_map(model: nn.Module, **options: object) -> PrecisionMap:
    table = PrecisionMap(auto=AutoScaling(window=8, check_every=4, **options))
    convert_into(table, model, Conversion(format=linear_format("fp8-dynamic")))
    return table


def step(model: nn.Module, table: PrecisionMap, size: float = 1.0) -> None:
    x = torch.ones(16, 32) * size
    model(x).square().sum().backward()
    table.step()


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


def test_moves_to_delayed_and_back() -> None:
    model = two_layers()
    table = auto_map(model, tokens=1e9)
    for _ in range(7):
        step(model, table)
    assert set(table.formats().values()) == {"fp8-dynamic"}
    step(model, table)
    assert set(table.formats().values()) == {"fp8-delayed"}
    assert "would not have clamped" in table.changes[-1].reason
    assert all(not layer.kernel.cold for layer in table.layers.values()), "the history was kept"
    for _ in range(4):
        step(model, table, size=64.0)
    assert table.formats()["0"] == "fp8-dynamic"
    assert "delayed scaling clamped" in table.changes[-1].reason


@pytest.mark.parametrize("tokens", [None, 200e9, 1e12])
def test_budget_unknown_or_too_large(tokens: float | None) -> None:
    model = two_layers()
    table = auto_map(model, tokens=tokens)
    for _ in range(24):
        step(model, table)
    assert set(table.formats().values()) == {"fp8-dynamic"}


def test_a_growing_operand_stays_dynamic() -> None:
    model = two_layers()
    table = auto_map(model, tokens=1e9)
    for i in range(24):
        step(model, table, size=1.5**i)
    assert set(table.formats().values()) == {"fp8-dynamic"}


def test_resumed_decides_as_uninterrupted() -> None:
    whole, half, resumed = two_layers(), two_layers(), two_layers()
    table = auto_map(whole, tokens=1e9)
    first, second = auto_map(half, tokens=1e9), auto_map(resumed, tokens=1e9)
    courses: list[list[dict[str, str]]] = [[], []]
    for i in range(20):
        step(whole, table)
        courses[0].append(table.formats())
        if i < 7:
            step(half, first)
            courses[1].append(first.formats())
        else:
            if i == 7:
                second.load_state_dict(first.state_dict())
            step(resumed, second)
            courses[1].append(second.formats())
    assert courses[0] == courses[1]
    assert torch.equal(
        table.state_dict()["scales"]["history"], second.state_dict()["scales"]["history"]
    )


def test_nothing_seen_is_not_evidence() -> None:
    state = AutoScalingState(AutoScaling(tokens=1.0, window=1, check_every=1))
    nothing = torch.full((1, 3), torch.inf)
    assert state.step(["a"], [False], nothing) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be positive"),
        ({"clamp_bits": -1}, "clamp_bits must be at least 0"),
    ],
)
def test_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoScaling(**options)  # pyright: ignore


def test_plugin_options() -> None:
    with pytest.raises(ValueError, match="tokens must be None unless scaling is 'auto'"):
        FP8Precision("dynamic", tokens=1e9)
    with pytest.raises(ValueError, match="no delayed scaling"):
        FP8Precision("auto", backend="torchao")


@pytest.mark.parametrize(
    ("tokens", "continued", "scaling"),
    [
        (None, False, "dynamic"),
        (20e9, False, "delayed"),
        (20e9, True, "dynamic"),
        (200e9, False, "dynamic"),
        (3e12, False, "dynamic"),
    ],
)
def test_recommendation(tokens: float | None, continued: bool, scaling: str) -> None:
    advice = recommend_scaling(tokens=tokens, continued=continued)
    assert advice.scaling == scaling
    assert len(advice.reasons) == 2
    assert "2409.12517" in str(advice)


def test_recommendation_refuses_no_tokens() -> None:
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        recommend_scaling(tokens=0)
