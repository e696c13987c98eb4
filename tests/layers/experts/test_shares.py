"""FLOPs of experts: what is counted, and what `lightning-fp plan` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from lightning_fp import convert
from lightning_fp.cli.commands.plan import planned
from lightning_fp.cli.commands.plan_hardware import Outlook, outlook
from lightning_fp.cli.loading import UserModel
from lightning_fp.kernels.cost import DATA_SHEETS
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


def on_h100(name: str, format: str, rules: list[str], **sizes: Any) -> Outlook:
    """The outlook of a model on meta, as `lightning-fp plan --hardware h100` makes it."""
    with torch.device("meta"):
        model = mixture(name, "grouped_mm", **sizes)
    report = planned(model, format, rules, cuda_fp8=True, card=DATA_SHEETS["h100"])
    return outlook(UserModel(model=model), report, "h100", devices=8)


LARGE: dict[str, Any] = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)


def test_what_experts_gain_on_a_card_is_predicted() -> None:
    """Mixtral's size: 4,096 tokens of each expert, of matrices that public tables show to gain."""
    sizes = LARGE | dict(intermediate_size=14336, num_local_experts=8)
    found = on_h100("Mixtral", "fp8-rowwise", [], **sizes)
    row = found.found.layers[EXPERTS]
    assert (row.experts, row.casting) == (8, "row")
    assert row.tokens == 2 * found.found.tokens
    assert row.flops == 6 * row.tokens * 3 * 4096 * 14336
    assert 1 < row.speedup < 1.3
    high = on_h100("Mixtral", "fp8-rowwise", ["*experts=bf16"], **sizes)
    assert high.found.layers[EXPERTS].speedup == 1
    assert found.found.linears_bf16 == pytest.approx(high.found.linears_bf16)
    assert found.found.known == pytest.approx(high.found.known)
    assert found.found.speedup_end_to_end > high.found.speedup_end_to_end > 1  # pyright: ignore


def test_experts_of_a_qwen3_moe_are_said_to_lose() -> None:
    """Its matrices, and 512 tokens of an expert, are smaller than any that a public table has."""
    sizes = LARGE | dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536)
    found = on_h100("Qwen3Moe", "fp8-rowwise", ["*experts=fp8-rowwise"], **sizes)
    assert found.found.layers[EXPERTS].speedup < 1
    assert EXPERTS in found.losing
    left = on_h100("Qwen3Moe", "fp8-rowwise", [], **sizes)
    assert EXPERTS not in left.losing
    assert left.found.speedup_end_to_end > found.found.speedup_end_to_end  # pyright: ignore
    screen = Console(record=True, width=100)
    found.show(screen)
    shown = screen.export_text()
    assert "model.layers.*.mlp.experts (128 experts)" in shown
    assert "linear layers and experts, forward and backward" in shown
    assert "a grouped product reaches 70% of a single one (pytorch/ao#2490)" in shown


def test_experts_apart_have_their_share_of_the_prediction() -> None:
    sizes = LARGE | dict(intermediate_size=14336, num_local_experts=8)
    found = on_h100("Mixtral", "fp8-rowwise", [f"{EXPERTS}[2]=bf16"], **sizes)
    whole, one = found.found.layers[EXPERTS], found.found.layers[f"{EXPERTS}[2]"]
    assert (whole.experts, one.experts) == (7, 1)
    assert whole.tokens == 7 * one.tokens
    assert one.casting is None
