"""The numerics on other machines: instruction sets and numbers of threads that torch can be told.

What a sum comes to depends on both, so bounds of tests must follow from the sum and not from the
CPU they were written on. Each setting compiles into a cache of its own: code that Inductor made for
one instruction set gives NaN under another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "two-threads": {"TEST_THREADS": "2"},
    "three-threads": {"TEST_THREADS": "3"},
}


def run(setting: str, cache: Path, *tests: str) -> None:
    """Run tests under a setting, and fail with what they print if they do."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=ROOT,
        env={**os.environ, **SETTINGS[setting], "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_products_without_vector_instructions(tmp_path: Path) -> None:
    """One setting and the products, which are what sums most; the whole is slow."""
    products = "accuracy and eager or emulation"
    run("default", tmp_path, "tests/kernels/test_native.py", "-k", products)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["numerics", "kernels", "layers", "metrics"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_numerics(setting: str, part: str, tmp_path: Path) -> None:
    run(setting, tmp_path, f"tests/{part}")
