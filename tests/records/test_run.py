"""What a run is, at each of its starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_fp.records import LayerInfo, RunInfo, read_run, write_run

INFO = RunInfo(
    step=10,
    settings={"FP8Precision": {"scaling": "fp8-delayed", "layers": {"*head": "bf16"}}},
    layers=(
        LayerInfo(name="a", format="fp8-delayed", kernel="native", flops_share=0.75),
        LayerInfo(name="b", format="bf16", kernel="nn.Linear", flops_share=None, reason="head"),
    ),
    parameters=100,
    device="CPU",
    world_size=2,
    strategy="DDPStrategy",
    versions={"torch": "2.11"},
    time=1.5,
)


def test_every_start_comes_back(tmp_path: Path) -> None:
    assert read_run(tmp_path / "run") == []
    resumed = RunInfo(step=20)
    write_run(tmp_path / "run", INFO)
    write_run(tmp_path / "run", resumed)
    assert read_run(tmp_path / "run") == [INFO, resumed]


def test_what_is_no_plain_data_is_text(tmp_path: Path) -> None:
    write_run(tmp_path, RunInfo(step=0, settings={"A": {"path": Path("x"), "none": None}}))
    assert read_run(tmp_path)[0].settings == {"A": {"path": "x", "none": None}}


def test_lines_that_cannot_be_read_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path, INFO)
    path = tmp_path / "run.jsonl"
    later = path.read_text().replace('"step": 10', '"step": 11, "colour": "red"')
    path.write_text(f"{path.read_text()}no json\n{later}{path.read_text()[:40]}")
    with caplog.at_level(logging.WARNING):
        starts = read_run(tmp_path)
    assert [start.step for start in starts] == [10, 11]  # a later version's field is no harm
    assert len(caplog.records) == 2
