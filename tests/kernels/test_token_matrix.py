"""Any number of tokens, in every FP8 format: hardware's branch and emulation, eager and compiled.

Each output and gradient of a layer is that of float64 over the same quantised operands, within the
bound of its sums. Hardware's branch runs on the CPU, behind CUDA's rules (`cuda_rules.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp import PrecisionMap, convert
from lightning_fp.format_names import TABLE
from lightning_fp.kernels.transformer_engine.kernel import use_library
from lightning_fp.layers import linear_format
from tests.kernels.cuda_rules import CudaRules, on_hardware, ruled
from tests.kernels.quantised import products
from tests.te_stub.fake import fake_library

TOKENS = 1, 7, 24, 33
SIZES = 160, 224
"""in_features and out_features: whole blocks of 32, as hardware wants them for `mxfp8`; ragged ones
of 128."""

WHOLE = 128, 256
"""As hardware wants them for `fp8-block`."""

FORMATS = [row.name for row in TABLE if row.scaling != "none" and row.name != "nvfp4"]
STANDS_IN = {
    "fp8-dynamic": "fp8-dynamic",
    "fp8-delayed": "fp8-delayed",
    "fp8-block": "fp8-dynamic[grad_output=e4m3]",
}
"""What Transformer Engine's stand-in multiplies in: it has one scale per tensor in all formats."""

BRANCHES = {
    **{f"{format}, emulated": (format, "auto") for format in FORMATS},
    "mxfp8, torchao's emulation": ("mxfp8", "torchao"),
    **{f"{format}, hardware": (format, "hardware") for format in FORMATS},
    **{f"{format}, Transformer Engine": (format, "transformer-engine") for format in STANDS_IN},
}
"""(format, what multiplies it)."""

branches = pytest.mark.parametrize("branch", BRANCHES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Cell:
    """A layer in one format, on one branch, which is run with any number of tokens."""

    def __init__(self, branch: str, dtype: torch.dtype, compiler: Any = None) -> None:
        self.format, self.backend = BRANCHES[branch]
        by_row = self.backend == "hardware" and self.format.startswith(("fp8-rowwise", "mxfp8"))
        # torch returns products by row, and torchao's of MX formats, in bf16 alone.
        self.dtype, self.returned = dtype, torch.bfloat16 if by_row else dtype
        torch.manual_seed(0)
        blocks = branch == "fp8-block, hardware"
        self.sizes = WHOLE if blocks or self.backend == "transformer-engine" else SIZES
        self.model = nn.Sequential(nn.Linear(*self.sizes, bias=False).to(dtype))
        with torch.no_grad():
            self.model[0].weight.copy_(self.given(self.model[0].weight))
        ours = self.backend in ("auto", "hardware")
        self.table: PrecisionMap = convert(
            self.model,
            self.format,
            layers={"*": self.format},
            backend="auto" if ours else self.backend,  # pyright: ignore[reportArgumentType]
        ).precision_map
        self.layer: Any = self.table.layers["0"]
        self.forward = (
            self.model if compiler is None else torch.compile(self.model, backend=compiler)
        )
        for tokens in (64, 64) if self.format == "fp8-delayed" else ():
            self.step(self.batch(tokens, 1.0))  # the first looks for scales
        if self.backend == "hardware":
            layer = self.layer
            layer.switch(layer.format, on_hardware(layer.kernel))

    def batch(self, tokens: int, size: float) -> tuple[Tensor, Tensor]:
        """Input, and the output's gradient."""
        x, g = (torch.randn(tokens, size) for size in self.sizes)
        return self.given(x * size).requires_grad_(), self.given(g * size * 1e-3)

    def given(self, values: Tensor) -> Tensor:
        """Numbers that no cast on the way rounds: compiled code may leave that one out."""
        return values.to(self.returned).to(self.dtype)

    def step(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Output and gradients of input and weight."""
        x, g = batch
        self.model.zero_grad()
        with self.table.forward_context():
            output = self.forward(x)
        output.backward(g)
        self.table.after_backward()
        self.table.step()
        assert x.grad is not None
        return [output.detach(), x.grad, self.layer.weight.grad]

    def worst(self, tokens: int) -> float:
        """How much of its bound the largest error takes."""
        x, g = batch = self.batch(tokens, 2.0)  # delayed scales clamp some of it
        scales = self.layer.memory.scales.tolist() if self.format == "fp8-delayed" else None
        found = self.step(batch)
        assert [each.dtype for each in found] == [self.dtype] * 3
        format = STANDS_IN[self.format] if self.backend == "transformer-engine" else self.format
        expected = products(x, self.layer.weight, g, linear_format(format), scales)
        return max(
            product.excess(each, self.returned, 2)
            for product, each in zip(expected, found, strict=True)
        )


@contextmanager
def cell(branch: str, dtype: torch.dtype, compiler: Any = None) -> Iterator[Cell]:
    rules = CudaRules() if compiler is None else nullcontext()  # compiled code cannot see it
    with use_library(fake_library()), rules:
        yield Cell(branch, dtype, compiler)


@dtypes
@branches
def test_any_number_of_tokens(branch: str, dtype: torch.dtype) -> None:
    with cell(branch, dtype) as made:
        for tokens in TOKENS:
            assert made.worst(tokens) <= 1


COMPILED = [branch for branch in BRANCHES if branch != "fp8-delayed, Transformer Engine"]
"""Under delayed scaling Transformer Engine is refused in compiled code."""


@pytest.mark.slow
@pytest.mark.parametrize("branch", COMPILED)
def test_compiled(branch: str) -> None:
    """The graphs of forward and backward, their products behind the rules."""
    with cell(branch, torch.float32, ruled()) as made:
        for tokens in TOKENS:
            assert made.worst(tokens) <= 1


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("branch", [b for b in COMPILED if b != "fp8-block, hardware"])
def test_compiled_by_inductor(branch: str, dtype: torch.dtype) -> None:
    """On the CPU's own products, of which it has none with scales of blocks."""
    with cell(branch, dtype, "inductor") as made:
        for tokens in TOKENS:
            assert made.worst(tokens) <= 1
