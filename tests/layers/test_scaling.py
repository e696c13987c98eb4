"""What users give as `scaling`: one reader, so what one place accepts all accept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_fp import (
    DelayedScaling,
    DynamicScaling,
    FP8Precision,
    LinearFormat,
    Stage,
    convert,
    precision_plugin,
)
from lightning_fp.cli import main
from lightning_fp.format_names import CANONICAL
from lightning_fp.layers import backends
from lightning_fp.layers.format import HIGH_PRECISION, NAMED_FORMATS
from lightning_fp.layers.scaling import read_scaling
from tests.helper import TinyGPT

MODELS = Path(__file__).parents[2] / "examples" / "models.py"
EVERYWHERE = [name for name, meant in CANONICAL.items() if meant not in (*HIGH_PRECISION, "nvfp4")]
"""Without what needs the hardware."""


@pytest.mark.parametrize("name", EVERYWHERE)
def test_all_readers_take_every_name(name: str) -> None:
    meant = CANONICAL[name]
    stage = Stage(name="a", layers={"*": name})
    assert stage.layers["*"] == meant
    assert FP8Precision(name).settings()["scaling"] == meant
    assert precision_plugin(name).settings()["scaling"] == meant
    assert FP8Precision(layers={"*": name}).settings()["layers"]["*"] == meant
    report = convert(TinyGPT(), name)
    assert {layer.format for layer in report.converted} == {meant}
    table = convert(TinyGPT(), "bf16").precision_map
    table.set("*", name)
    table.apply()
    assert set(table.formats().values()) == {meant}


@pytest.mark.parametrize("name", ["delayed", "fp8-mx", "auto"])
def test_the_command_line_takes_them_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{MODELS}:llama_like", "--scaling", name, "--json"]) == 0
    low = [row for row in json.loads(capsys.readouterr().out)["layers"] if row["reason"] is None]
    assert {row["format"] for row in low} == {read_scaling(name).format.name}


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        (DynamicScaling(), "fp8-dynamic"),
        (DynamicScaling("row"), "fp8-rowwise"),
        (DynamicScaling("block"), "fp8-block"),
        (DelayedScaling(history_len=4), "fp8-delayed"),
        (LinearFormat("dynamic", grad_output="e4m3"), "fp8-dynamic[grad_output=e4m3]"),
        ("e8m3", "e8m3"),
        ("rowwise[grad_output=e5m2]", "fp8-rowwise[grad_output=e5m2]"),
    ],
)
def test_records_are_read_as_names_are(scaling: Any, name: str) -> None:
    assert convert(TinyGPT(), scaling).converted[0].format == name
    assert precision_plugin(scaling).settings()["scaling"] == name
    assert FP8Precision(scaling).settings()["scaling"] == name
    if not isinstance(scaling, DelayedScaling):
        assert Stage(name="a", layers={"*": scaling}).layers["*"] == name


def test_convert_takes_the_history_with_the_name() -> None:
    assert convert(TinyGPT(), "delayed").precision_map.scale_history.config == DelayedScaling()
    short = DelayedScaling(history_len=4, margin=1)
    assert convert(TinyGPT(), short).precision_map.scale_history.config == short
    assert convert(TinyGPT(), delayed=short).precision_map.scale_history.config == short
    with pytest.raises(ValueError, match="delayed must be None where format says how"):
        convert(TinyGPT(), short, delayed=DelayedScaling())


def test_convert_follows_all_layers_with_auto() -> None:
    table = convert(TinyGPT(), "auto").precision_map
    assert len(table.scale_history) == sum(f == "fp8-dynamic" for f in table.formats().values())
    for choose in (convert_on, FP8Precision):
        with pytest.raises(ValueError, match="backend must be 'auto' or 'native' with scaling"):
            choose("auto", backend="torchao")


def convert_on(scaling: str, backend: Any) -> object:
    return convert(TinyGPT(), scaling, backend=backend)


@pytest.mark.parametrize("read", [FP8Precision, precision_plugin, lambda n: convert(TinyGPT(), n)])
def test_a_misspelled_name_is_refused_alike(read: Callable[[str], object]) -> None:
    message = f"scaling: format must be one of {', '.join(NAMED_FORMATS)}"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}.*did you mean 'delayed'\?"):
        read("delaied")


@pytest.mark.parametrize("value", ["auto", "fp8-auto", DelayedScaling(history_len=4)])
def test_a_choice_for_the_whole_run_is_no_layers_format(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"cannot be used: a choice for a whole run.*'fp8-delayed'"
    ):
        convert(TinyGPT(), layers={"*": value})
    with pytest.raises(ValueError, match=r"cannot be used|must be a name"):
        Stage(name="a", layers={"*": value})


def test_a_write_asks_for_its_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = convert(TinyGPT()).precision_map
    asked: list[str] = []

    def counted(format: LinearFormat, *args: Any, **options: Any) -> Any:
        asked.append(format.name)
        return real(format, *args, **options)

    real = backends.kernel_for
    monkeypatch.setattr(backends, "kernel_for", counted)
    assert len(table.set("*.fc?", "fp8-rowwise", reason="once")) == 4
    assert len(table.apply()) == 4
    assert asked == ["fp8-rowwise"]
    with table.overridden({"blocks.0.fc1": "e8m3", "blocks.1.fc1": "e8m3"}):
        assert asked == ["fp8-rowwise", "e8m3"]
