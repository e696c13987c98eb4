"""What is measured on: the card, versions, the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from parts.card import Card
from parts.rows import Rows

PACKAGES = ("lightning", "torchao", "transformer-engine", "triton", "pyarrow", "pytest")


def measure(card: Card, rows: Rows) -> None:
    rows.add("python", None, note=platform.python_version())
    rows.add("torch", None, note=f"{torch.__version__}, CUDA {torch.version.cuda}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        rows.add(package, None, note=version)
    rows.add("commit", None, note=_commit())
    if card.device.type == "cuda":
        found = torch.cuda.get_device_properties(card.device)
        what = f"{found.name}, sm{found.major}{found.minor}, {found.multi_processor_count} SMs"
        rows.add("memory", found.total_memory / 2**30, "GiB", note=what)
    from lightning_fp.kernels.hardware import cuda_fp8_refusal

    rows.add("FP8 tensor cores", None, note=cuda_fp8_refusal() or "yes")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
