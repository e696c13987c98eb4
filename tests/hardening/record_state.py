"""Writes the state of this release into tests/states/; see there."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch

import lightning_fp
from tests.hardening.test_states import RELEASES, loop, step


def main() -> None:
    release = re.match(r"\d+\.\d+", lightning_fp.__version__)
    assert release is not None
    with tempfile.TemporaryDirectory() as directory:
        run = loop(Path(directory))
        for _ in range(3):
            step(run)
        state = run.state_dict()
        state["records"] = {"directory": None, "position": None}  # of no other machine
        torch.save(state, RELEASES / f"{release[0]}.pt")


if __name__ == "__main__":
    main()
