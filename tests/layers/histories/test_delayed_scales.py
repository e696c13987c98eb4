"""One slot per layer for what its kernel keeps, and tables that take layers over."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

from lightning_fp import convert
from lightning_fp.kernels import HighPrecisionKernel, NativeKernel, OperandMemory
from lightning_fp.kernels.transformer_engine import library as te_library
from lightning_fp.kernels.transformer_engine.kernel import Engine
from lightning_fp.layers import linear, precision_map
from lightning_fp.layers.histories.delayed_scales import DelayedScales
from tests.helper import TinyGPT, next_byte_loss, text_rows
from tests.te_stub.fake import fake_library

ROWS = text_rows(8)
LAYER = "blocks.0.fc1"


def trained(table: precision_map.PrecisionMap, model: TinyGPT, steps: int = 2) -> TinyGPT:
    for _ in range(steps):
        model.zero_grad()
        with table.forward_context():
            loss = next_byte_loss(model, ROWS)
        loss.backward()
        table.after_backward()
        table.step()
    return model


@pytest.mark.parametrize("module", [linear, precision_map])
def test_no_kernel_and_no_keeper_is_asked_for_its_type(module: object) -> None:
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    asked = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "isinstance"]
    others = {
        "isinstance(weight, StoredWeight)",
        "isinstance(input, DTensor)",
        "isinstance(weight, DTensor)",
        "isinstance(value, property)",
        "isinstance(x, nn.Module)",
    }
    assert set(asked) <= others


def test_a_memory_waits_while_another_kernel_runs() -> None:
    model = TinyGPT()
    table = convert(model, "delayed").precision_map
    trained(table, model)
    memory = table.layers[LAYER].memory
    assert isinstance(memory, OperandMemory)
    with table.overridden({LAYER: "bf16"}):
        assert isinstance(table.layers[LAYER].kernel, HighPrecisionKernel)
        assert table.layers[LAYER].memory is memory
    assert table.layers[LAYER].memory is memory
    table.set(LAYER, "bf16")
    table.apply()
    assert table.layers[LAYER].memory is None


def test_every_keeper_keeps_the_same_promise() -> None:
    with te_library.use_library(fake_library()):
        for backend in ("auto", "transformer-engine"):
            model = TinyGPT()
            rules = {"blocks.*": "delayed"}
            table = convert(model, "delayed", rules, backend=backend).precision_map
            trained(table, model, steps=3)
            scales = table.scale_history
            assert isinstance(scales, DelayedScales)
            assert scales.names == [n for n, f in table.formats().items() if f == "fp8-delayed"]
            record = scales.take_amax_record()
            assert record.layers == scales.names
            assert (record.values[..., 0] > 0).all()
            assert torch.isfinite(scales.headroom).all()


def test_a_table_takes_a_layer_over_with_all_it_kept() -> None:
    """The second table's histories are written, and not the first one's."""
    model = TinyGPT()
    first = convert(model, "delayed").precision_map
    trained(first, model)
    before = first.layers[LAYER].memory
    second = convert(model, "delayed").precision_map
    assert len(second.scale_history) == len(first.scale_history)
    assert second.layers[LAYER].memory is not before
    trained(second, model)
    history = second.scale_history.state_dict()["history"]
    assert (history[:, :, :2] > 0).all()


def test_a_layer_comes_from_transformer_engine_to_our_own_kernel() -> None:
    model = TinyGPT()
    with te_library.use_library(fake_library()):
        rules = {"blocks.*": "dynamic"}
        table = convert(model, layers=rules, backend="transformer-engine").precision_map
        assert isinstance(table.layers[LAYER].memory, Engine)
    table = convert(model, "dynamic").precision_map
    assert isinstance(table.layers[LAYER].kernel, NativeKernel)
    assert table.layers[LAYER].memory is None
    next_byte_loss(model, ROWS).backward()
