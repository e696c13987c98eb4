"""What a rehearsal says, and what follows from it."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from lightning_fp.callbacks.fallback.trainer_loop import FROM_LOADER
from lightning_fp.stability.replay.fingerprint import Item
from lightning_fp.stability.replay.rehearsal import (
    CONSEQUENCES,
    changes,
    noise_of,
    not_as_recorded,
    not_twice,
    outcome_of,
)


@pytest.mark.parametrize(
    ("one_step", "trajectory", "outcome"),
    [
        ([], [], "passed"),
        ([], ["x"], "one step"),
        (["x"], [], "limits only"),
        (["x"], ["y"], "limits only"),
    ],
)
def test_the_watch_confines_itself_to_what_was_harmless(
    one_step: list[str], trajectory: list[str], outcome: str
) -> None:
    assert outcome_of(one_step, trajectory) == outcome


def test_the_hook_and_what_it_changes_are_named() -> None:
    own = [Item(owner="Average", what=f"self.shadow[{i}]") for i in range(5)]
    assert changes("on_train_batch_end", "Average", own) == (
        "on_train_batch_end of Average changes self.shadow[0], self.shadow[1], self.shadow[2]"
        " and 2 more"
    )
    assert changes("training_step", "Net", own[:1]) == (
        "training_step of Net changes self.shadow[0] of Average"
    )
    weight = [Item(owner="", what="the Parameter a.weight")]
    assert changes("", "", weight) == "a replayed step changes the Parameter a.weight"


def test_the_same_step_twice() -> None:
    assert not_twice([2.31, 2.31, 2.29]) == (
        "training_step gives another loss the second time: 2.31 and 2.29"
    )
    assert not_twice([2.0, 2.0, 2.001]) == ""  # kernels that are not deterministic
    assert not_twice([math.nan, math.nan]) == ""
    assert "nan" in not_twice([2.0, math.nan])
    assert not_twice([2.0]) == not_twice([]) == ""


def test_a_step_from_a_snapshot() -> None:
    line = not_as_recorded(2.5, 2.4)
    assert line.endswith("(loss 2.5 and 2.4)")
    assert not_as_recorded(None, 2.4) == not_as_recorded(2.4, 2.4) == ""
    assert not_as_recorded(2.4001, 2.4) == ""


def test_losses_are_told_as_short_as_they_differ() -> None:
    assert not_twice([100.4, 99.9]).endswith("100 and 99.9")
    assert not_twice([100.4, 99.96]).endswith("100.4 and 99.96")


def test_noise() -> None:
    assert noise_of([2.0, 2.0]) == noise_of([]) == 0
    assert noise_of([2.0, 1.9, 2.0]) == pytest.approx(0.05)


def sentences(path: Path) -> list[str]:
    """Pieces of text in the code that are sentences, or begin one; no docstrings, nothing short."""
    tree = ast.parse(path.read_text())
    parents = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documents = {
        id(statement.value)
        for node in ast.walk(tree)
        for statement in (node.body if isinstance(node, parents) else [])
        if isinstance(statement, ast.Expr)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in documents and node.value.count(" ") > 2
    ]
    told = [text for text in texts if text not in CONSEQUENCES.values()]  # these have a table
    return [text.replace("%s", "").strip(" :,") for text in told]


ROOT = Path(__file__).parents[3]
CODE = ("stability/replay/rehearsal.py", "stability/supervise/rehearsal.py")
TOLD = [FROM_LOADER, *(text for f in CODE for text in sentences(ROOT / "lightning_fp" / f))]


@pytest.mark.parametrize("text", TOLD)
def test_every_line_is_on_the_page_with_what_to_do(text: str) -> None:
    assert text in (ROOT / "docs" / "rehearsal.md").read_text()
