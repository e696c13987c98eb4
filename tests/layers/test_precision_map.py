"""PrecisionMap: reads, writes at boundaries, state."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import nn

from lightning_fp import PrecisionMap, convert, revert
from lightning_fp.kernels.memory import OperandMemory
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.layers import Change, Conversion, convert_into, linear_format
from lightning_fp.layers.rules import layer_rules
from tests.helper import TinyGPT


def filled(format: str = "fp8-dynamic", layers: dict[str, str] | None = None) -> PrecisionMap:
    return convert(TinyGPT(), format, layers).precision_map


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(one) == plain(other)


def fill(table: PrecisionMap, format: str = "fp8-dynamic", layers: object = None) -> None:
    rules = layer_rules(layers)  # pyright: ignore
    convert_into(table, TinyGPT(), Conversion(format=linear_format(format), rules=rules))


def test_writes_wait_for_the_boundary() -> None:
    table = filled()
    assert table.set("*.fc?", "bf16", reason="too much clamping") == [
        "blocks.0.fc1",
        "blocks.0.fc2",
        "blocks.1.fc1",
        "blocks.1.fc2",
    ]
    assert table.formats()["blocks.0.fc1"] == "fp8-dynamic"
    changes = table.apply()
    assert changes == table.changes
    assert changes[0] == Change(
        layer="blocks.0.fc1", before="fp8-dynamic", after="bf16", reason="too much clamping"
    )
    assert table.formats()["blocks.1.fc2"] == "bf16"
    assert table.apply() == []
    assert len(table.changes) == 4


def test_the_last_of_several_writes_counts() -> None:
    table = filled()
    table.set("*", "bf16", reason="one")
    table.set("*.fc1", "fp8-rowwise", reason="two")
    table.set("re:.*0.*", "e8m3", reason="three")
    changes = {change.layer: (change.after, change.reason) for change in table.apply()}
    assert changes["blocks.0.fc1"] == ("e8m3", "three")
    assert changes["blocks.1.fc1"] == ("fp8-rowwise", "two")
    assert changes["lm_head"] == ("bf16", "one")


def test_a_write_of_the_present_format_is_no_change() -> None:
    table = filled()
    table.set("*.fc1", "fp8-dynamic")
    assert table.apply() == []


def test_any_format_can_be_written() -> None:
    table = filled()
    config = import_float8().Float8LinearConfig.from_recipe_name("rowwise")
    table.set("*.fc1", config)
    table.set("*.fc2", linear_format("fp8-dynamic[grad_weight=high]"))
    table.apply()
    assert table.formats()["blocks.0.fc1"] == "torchao-rowwise"
    assert table.layers["blocks.0.fc1"].kernel.config == config
    assert table.formats()["blocks.0.fc2"] == "fp8-dynamic[grad_weight=high]"


@pytest.mark.parametrize(
    ("pattern", "format", "message"),
    [
        ("*.fc3", "bf16", "pattern '*.fc3' matches no linear layer"),
        ("re:(", "bf16", "layer pattern must be a regular expression"),
        ("*", "bf17", "format must be one of"),
    ],
)
def test_bad_writes_are_refused_at_once(pattern: str, format: str, message: str) -> None:
    for table in (filled(), *([PrecisionMap()] if "fc3" not in pattern else [])):
        with pytest.raises(ValueError, match=re.escape(message)):
            table.set(pattern, format)
        assert table.apply() == []


def test_writes_before_the_table_is_filled_wait_for_it() -> None:
    table = PrecisionMap()
    assert table.set("*.fc1", "bf16") == []
    assert table.apply() == []
    fill(table)
    assert table.formats()["blocks.0.fc1"] == "fp8-dynamic"
    table.apply()
    assert table.formats()["blocks.0.fc1"] == "bf16"


def test_a_waiting_write_that_matches_nothing_is_refused_at_setup() -> None:
    table = PrecisionMap()
    table.set("*.fc3", "bf16")
    with pytest.raises(ValueError, match=r"pattern '\*\.fc3' matches no linear layer"):
        fill(table)


def test_the_backend_is_asked() -> None:
    table = convert(TinyGPT(), backend="native").precision_map
    with pytest.raises(ValueError, match="backend 'native' cannot run 'fp8-rowwise'"):
        table.set("*", "fp8-rowwise")


# -- state --------------------------------------------------------------------------------------


def test_state_round_trip() -> None:
    table = filled(layers={"blocks.0.*": "fp8-rowwise"})
    table.set("*.fc1", "bf16", reason="first")
    table.apply()
    table.set("*.fc2", "e8m3", reason="pending")
    state = table.state_dict()
    twin = filled(layers={"blocks.0.*": "fp8-rowwise"})
    twin.load_state_dict(state)
    assert twin.formats() == table.formats()
    assert same_state(twin.state_dict(), state)
    assert [c.layer for c in twin.apply()] == [c.layer for c in table.apply()]
    assert twin.formats()["blocks.0.fc2"] == "e8m3"


def test_state_is_plain_data(tmp_path: object) -> None:
    table = filled()
    table.set("*.fc1", "bf16", reason="why")
    path = f"{tmp_path}/state.pt"
    torch.save(table.state_dict(), path)
    assert same_state(torch.load(path, weights_only=True), table.state_dict())


def test_state_may_come_before_the_layers() -> None:
    table = filled()
    table.set("*.fc1", "bf16")
    table.apply()
    table.set("*.fc2", "e8m3")
    early = PrecisionMap()
    early.load_state_dict(table.state_dict())
    fill(early)
    assert early.formats() == table.formats()
    assert same_state(early.state_dict(), table.state_dict())


def test_a_torchao_config_survives_where_the_configuration_knows_it() -> None:
    config = import_float8().Float8LinearConfig.from_recipe_name("rowwise")
    table = convert(TinyGPT(), config).precision_map
    twin = convert(TinyGPT(), config).precision_map
    twin.load_state_dict(table.state_dict())
    assert twin.formats() == table.formats()
    assert twin.layers["blocks.0.fc1"].kernel.config == config


def test_a_changed_configuration_wins_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    table = filled()
    table.set("blocks.*", "e8m3")
    table.apply()
    twin = filled(layers={"*.fc1": "fp8-rowwise"})
    with caplog.at_level(logging.WARNING, "lightning_fp"):
        twin.load_state_dict(table.state_dict())
    assert "2 of 9 layers keep their configured format" in caplog.text
    assert twin.formats()["blocks.0.fc1"] == "fp8-rowwise"
    assert twin.formats()["blocks.0.fc2"] == "e8m3"


def test_a_grown_model_keeps_its_new_layers_configured(caplog: pytest.LogCaptureFixture) -> None:
    table = filled()
    grown = convert(TinyGPT(blocks=3)).precision_map
    with caplog.at_level(logging.WARNING, "lightning_fp"):
        grown.load_state_dict(table.state_dict())
    assert "4 of 13 layers keep their configured format" in caplog.text


@pytest.mark.parametrize("version", [None, 0, 99, "1"])
def test_unknown_versions_are_refused(version: object) -> None:
    table = filled()
    state = {**table.state_dict(), "version": version}
    message = f"precision map state must have version 1, got {version!r}; resume with the"
    with pytest.raises(ValueError, match=re.escape(message)):
        table.load_state_dict(state)


def test_the_map_after_revert() -> None:
    model = TinyGPT()
    table = convert(model).precision_map
    revert(model)
    table.clear()
    assert table.formats() == {}
    assert table.model is None
    assert type(model.lm_head) is nn.Linear


# -- telling ------------------------------------------------------------------------------------


def test_the_table_tells_its_writes_whoever_makes_them() -> None:
    table = PrecisionMap()
    told: list[Change] = []
    table.subscribe(told.extend)
    fill(table)
    assert told == []  # what it begins with is no change
    table.set("*.fc1", "bf16", reason="because", author="rollout")
    table.set("lm_head", "fp32")
    assert told == []
    table.apply()
    assert told == table.changes
    assert [(c.layer, c.author) for c in told] == [
        ("blocks.0.fc1", "rollout"),
        ("blocks.1.fc1", "rollout"),
        ("lm_head", "user"),
    ]
    with table.overridden({"blocks.0.fc1": "fp8-dynamic"}):
        table.set("*.fc2", "bf16")
        table.apply()
    table.set("*.fc1", "bf16")  # what they have
    assert len(told) == 3
    table.apply()
    assert {c.layer for c in told[3:]} == {"blocks.0.fc2", "blocks.1.fc2"}
    twin = filled()
    restored: list[Change] = []
    twin.subscribe(restored.extend)
    twin.load_state_dict(table.state_dict())
    assert {c.author for c in restored} == {"checkpoint"}


def test_who_unsubscribes_hears_no_more() -> None:
    table = filled()
    told: list[str] = []
    ends = [table.subscribe(lambda _, name=name: told.append(name)) for name in "ab"]
    for format in ("bf16", "fp8-dynamic"):
        table.set("lm_head", format)
        table.apply()
        ends[0]()
    assert told == ["a", "b", "b"]


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-delayed"])
def test_what_is_recorded_in_a_replay_is_dropped(format: str) -> None:
    """Code that was compiled to record serves a replay only if layers go on recording."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    table = convert(model, format, {"*": format}).precision_map
    table.watch_casts(True)
    model(torch.randn(4, 16)).sum().backward()

    def recorded() -> list[Any]:
        memories = [layer.memory for layer in table.layers.values()]
        assert all(isinstance(memory, OperandMemory) for memory in memories)
        leaves = [memory.grad_leaf.grad for memory in memories]
        return [
            *([memory.recorded.clone(), memory.amaxes, memory.calls] for memory in memories),
            [None if leaf is None else leaf.clone() for leaf in leaves],
        ]

    before = recorded()
    assert any(layer.record for layer in table.layers.values())
    for recording in (False, True):
        with table.overridden({}, recording=recording):
            assert all(layer.record is recording for layer in table.layers.values())
            model(100 * torch.randn(4, 16)).sum().backward()
        torch.testing.assert_close(recorded(), before, rtol=0, atol=0)
        assert all(layer.record for layer in table.layers.values())
