"""FLOPs of experts: what is counted, and what `lightning-fp plan` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_fp import convert
from lightning_fp.cli.commands.plan import planned
from lightning_fp.layers.conversion.flops import counting_flops, example_flops
from lightning_fp.layers.conversion.work import example_work
from tests.experts import batch, mixture

PER_TOKEN = 2 * 2 * (32 * 2 * 48 + 48 * 32)
"""Of one layer of the Qwen3-MoE in `tests.experts`, two experts of it."""
EXPERTS = "model.layers.0.mlp.experts"


def tokens(ids: torch.Tensor) -> int:
    return ids.numel()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_products_of_experts_are_counted(implementation: str) -> None:
    model, ids = mixture("Qwen3Moe", implementation), batch()
    with counting_flops(model) as flops:
        model(ids)
    assert flops[EXPERTS] == PER_TOKEN * tokens(ids)


def test_what_transformers_falls_back_to_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    moe: Any = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    model, ids = mixture("Qwen3Moe", "grouped_mm"), batch()
    with counting_flops(model) as flops:
        model(ids)
    assert flops[EXPERTS] == PER_TOKEN * tokens(ids)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plan_tells_the_shares(device: str, implementation: str) -> None:
    ids = batch()
    with torch.device(device):
        model = mixture("Qwen3Moe", implementation)
    report = planned(model, "fp8-rowwise")
    unmeasured = {row.name: row.flops_share for row in report.layers}
    report = report.with_flops(*example_flops(model, {"input_ids": ids}))
    rows = {row.name: row for row in report.layers}
    per_token = 32 * 2 * (32 + 2 * 16 + 32)  # attention's linear layers
    per_token += 2 * 32 * 8  # the router
    everything = 2 * (PER_TOKEN + per_token) + 2 * 32 * 64  # and the head
    attention = rows[EXPERTS].flops_share / (PER_TOKEN / everything)  # its products, not in a layer
    assert 0.8 < attention <= 1
    assert rows[EXPERTS].flops_share == pytest.approx(
        rows["model.layers.1.mlp.experts"].flops_share
    )
    assert report.flops_share > 0.75
    assert unmeasured[EXPERTS] == pytest.approx(PER_TOKEN / (everything - 4 * 32 * 8))
    assert "2 groups of experts among them" in report.summary()


def test_work_beside_linear_layers_has_the_experts() -> None:
    model = mixture("Qwen3Moe", "grouped_mm")
    convert(model, "fp8-rowwise")
    work = example_work(model, {"input_ids": batch()})
    assert work.product_flops >= 2 * PER_TOKEN * tokens(batch())
