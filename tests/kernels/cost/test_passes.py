"""The passes of the cost model are those that Inductor makes of our kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch import config as functorch
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering

from lightning_fp.kernels import Kernel
from lightning_fp.kernels.cost.passes import COLUMNS_TWICE, EMULATED, PASSES, Casting
from lightning_fp.layers.backends import kernel_for
from lightning_fp.layers.format import linear_format
from tests.kernels.cuda_rules import on_hardware

SHAPES = ((512, 256, 1024), (1024, 256, 512), (256, 512, 1536))
"""Tokens, in_features, out_features: three, for three unknowns."""


def moved(kernel: Kernel, m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the fused loops of forward and backward read and write, without the products."""
    total = 0
    count = GraphLowering.count_bytes

    def counted(graph: GraphLowering) -> Any:
        nonlocal total
        result = count(graph)
        nodes = graph.scheduler.nodes
        products = [node for node in nodes if type(node).__name__ == "ExternKernelSchedulerNode"]
        total += result[0] - sum(node.get_read_write_buffers_sizes() for node in products)
        return result

    monkeypatch.setattr(GraphLowering, "count_bytes", counted)
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda _: True)
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(n, k, dtype=torch.bfloat16, requires_grad=True)
    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        compiled = torch.compile(lambda x, w: kernel(x, w, None, "layer"), fullgraph=True)
        y = compiled(x, weight)
        y.backward(torch.randn_like(y))
    monkeypatch.undo()
    return total


def per_element(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Bytes per element of input, weight and grad_output."""
    elements = [[m * k, n * k, m * n] for m, k, n in SHAPES]
    bytes = [moved(kernel, *shape, monkeypatch) for shape in SHAPES]
    solved = torch.linalg.solve(
        torch.tensor(elements, dtype=torch.float64), torch.tensor(bytes, dtype=torch.float64)
    )
    return solved.tolist()


def kernel(name: str, backend: str, *, hardware: bool) -> Kernel:
    emulated = kernel_for(linear_format(name), backend, cuda_fp8=False)
    return on_hardware(emulated) if hardware else emulated


@pytest.mark.slow
def test_native_makes_the_passes_that_are_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    m, k, n = SHAPES[0]
    passes = PASSES["tensor"]
    expected = passes.input * m * k + passes.weight * n * k + passes.grad_output * m * n
    counted = moved(kernel("fp8-dynamic", "native", hardware=True), m, k, n, monkeypatch)
    assert counted == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_native_makes_no_more_passes_than_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = per_element(kernel("fp8-dynamic", "native", hardware=True), monkeypatch)
    torchaos = per_element(kernel("fp8-dynamic", "torchao", hardware=True), monkeypatch)
    assert all(a <= b + 0.05 for a, b in zip(ours, torchaos, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend", "casting", "more"),
    [
        ("fp8-delayed", "native", "tensor", 0),
        ("fp8-rowwise", "torchao", "row", COLUMNS_TWICE),
        ("fp8-rowwise-gw-hp", "torchao", "row-gw-hp", 0),
    ],
)
def test_passes_on_hardware(
    name: str, backend: str, casting: Casting, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = PASSES[casting]
    counted = per_element(kernel(name, backend, hardware=True), monkeypatch)
    expected = [passes.input - more, passes.weight - more, passes.grad_output - more]
    assert counted == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend", "casting"),
    [
        ("fp8-rowwise", "torchao", "row"),
        ("fp8-block", "native", "block"),
        ("mxfp8", "native", "mx"),
    ],
)
def test_passes_of_emulation(
    name: str, backend: str, casting: Casting, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = EMULATED[casting]
    counted = per_element(kernel(name, backend, hardware=False), monkeypatch)
    assert counted == pytest.approx([passes.input, passes.weight, passes.grad_output], abs=0.1)
