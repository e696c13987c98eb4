"""A run in blocks: it learns, its records say so, and its table is written as any other."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pytest

from lightning_fp import ClampMonitor, DynamicScaling, FP8Precision
from lightning_fp.records import read_statistics
from tests.helper import fit


@pytest.mark.parametrize(
    ("scaling", "format"), [(DynamicScaling("block"), "fp8-block"), ("mx", "mxfp8")]
)
def test_statistics_of_a_run(tmp_path: Path, scaling: DynamicScaling | str, format: str) -> None:
    plugin = FP8Precision(scaling, layers={"*.0.fc1": "fp8-dynamic"})
    monitor = ClampMonitor(every_n_steps=4, what_if=True, dirpath=tmp_path)
    model = fit(plugin, max_steps=30, callbacks=[monitor])
    assert sum(model.losses[-5:]) < sum(model.losses[:5]) - 3

    table = read_statistics(tmp_path)
    blocks = table.filter((pc.field("format") == format) & (pc.field("operand") != "output"))
    assert set(blocks["operand"].to_pylist()) == {"input", "weight", "grad_output"}
    assert set(blocks["clamped_fraction"].to_pylist()) == {0.0}
    assert set(blocks["clamped_mass"].to_pylist()) == {0.0}
    assert min(blocks["sqnr_db"].to_pylist()) > 25
    assert min(blocks["scale_spread_bits"].to_pylist()) >= 0
    assert max(blocks["scale_spread_bits"].to_pylist()) > 0.1
    headroom = blocks["headroom_bits"].to_pylist()
    assert max(map(abs, headroom)) < (1e-6 if format == "fp8-block" else 1.0 + 1e-6)
    assert None not in blocks["what_if_block_underflow_fraction"].to_pylist()
    tensor = table.filter(pc.field("format") == "fp8-dynamic")
    assert set(tensor["scale_spread_bits"].to_pylist()) == {None}
    assert (
        None
        not in tensor.filter(pc.field("operand") != "output")[
            "what_if_block_underflow_fraction"
        ].to_pylist()
    )
