"""Whole steps with autograd on fake cards, on any build of torch; see `tests/fake_cards`."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests import forked


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_steps_on_fake_cards(marked: str, tmp_path: Path) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends written in Python")
    log = tmp_path / "log"
    steps = forked.start("tests.fake_cards.run", marked, log=log)
    steps.join()
    assert steps.exitcode == 0, log.read_text()[-8000:]
    assert " passed" in log.read_text()
