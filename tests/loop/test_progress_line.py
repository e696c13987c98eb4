"""The bar of a plain loop: on a terminal, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from lightning_fp.loop.progress_line import ProgressLine


def test_it_is_silent_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    def words() -> dict[str, str]:
        raise AssertionError("asking waits for the device")

    line = ProgressLine(None, 10)
    line.show(1, torch.tensor(2.5), words)
    line.close()
    assert capsys.readouterr() == ("", "")


def test_it_says_what_there_is_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(True, 10)
    line.show(3, torch.tensor(2.5), lambda: {"scale": "1024", "watch": ""})
    line.close()
    said = capsys.readouterr().err
    assert "loss 2.5000" in said
    assert "scale 1024" in said
    assert "watch" not in said
