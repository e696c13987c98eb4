"""What is asked of an optimizer's `step`, whatever that is."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from lightning_fp.stepping.gradients import calls_closure_itself, takes_closure


class WithoutClosure(torch.optim.SGD):
    def step(self) -> None:  # type: ignore[override]
        pass


class Needs(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


@pytest.mark.parametrize(
    ("kind", "itself", "takes"),
    [
        (torch.optim.SGD, False, True),
        (torch.optim.LBFGS, True, True),
        (WithoutClosure, False, False),
        (Needs, True, True),
    ],
)
def test_what_the_signature_tells(
    kind: type[torch.optim.Optimizer], itself: bool, takes: bool
) -> None:
    optimizer = kind([nn.Parameter(torch.ones(1))], lr=0.1)  # type: ignore[call-arg]
    assert calls_closure_itself(optimizer) is itself
    assert takes_closure(optimizer) is takes


def test_a_mock_hears_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    mock = MagicMock()
    monkeypatch.setattr(torch.optim.SGD, "step", mock)
    assert not calls_closure_itself(optimizer)
    assert takes_closure(optimizer)
    assert not mock.mock_calls


def test_a_step_in_c_takes_a_closure_as_torch_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    monkeypatch.setattr(torch.optim.SGD, "step", dict.update)  # has no signature
    assert not calls_closure_itself(optimizer)
    assert takes_closure(optimizer)
