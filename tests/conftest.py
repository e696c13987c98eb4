"""Every test starts with one thread, or `TEST_THREADS`, fresh compile caches and dynamo's limits.

Its working directory is its own, so that runs that write where they stand leave nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from tests import fp8_product


def _attends_in_bf16() -> bool:
    """Whether torch's fast attention runs: with AMX it packs by AVX-512, allowed to or not."""
    q = torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16)
    try:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError:
        return False
    return True


# Under ATEN_CPU_CAPABILITY below avx512, on a CPU that has more, plain torch would fail.
torch.backends.cuda.enable_flash_sdp(_attends_in_bf16())  # on CPUs too, in spite of its name
fp8_product.ensure()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it, and tables get narrow
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # whether anything was compiled is asked of these
