"""The house is as the pages say: places that they name exist, and what one looks for is there.

`WHERE` holds the questions of somebody who has seen nothing but the tree. Each has one place, whose
path should tell; where it moves, the answer moves with it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-one-step-flows.md"
PLACES = sorted(set(re.findall(r"`(lightning_fp/[\w/.]+\.py(?:::[\w.]+)?)`", PAGE.read_text())))

WHERE = {
    "Where is a layer demoted?": "lightning_fp/stability/supervise/demotion.py::write_formats",
    "Where does clamped mass combine over ranks?": "lightning_fp/numerics/combining.py::combine",
    "Who writes events?": "lightning_fp/records/event_log.py::EventLog.write",
    "Where does a write to the table take effect?": (
        "lightning_fp/layers/precision_map.py::PrecisionMap.apply"
    ),
    "Where is it decided which layers are converted?": (
        "lightning_fp/layers/conversion/decide.py::decide"
    ),
    "What does the name of a format mean?": "lightning_fp/format_names.py::TABLE",
    "Where does a delayed scale follow from its history?": (
        "lightning_fp/numerics/delayed.py::history_scale"
    ),
    "Where is an anomaly of the loss noticed?": (
        "lightning_fp/stability/detect/detector.py::DivergenceDetector"
    ),
    "Where is a state of the run put back?": (
        "lightning_fp/stability/supervise/run_state.py::RunState.go_back"
    ),
    "What must a gate of a rollout be given?": "lightning_fp/recipes/gate.py::Gate",
}


def defined(place: str) -> bool:
    """Whether a file has what is named behind `::`, as `Class.method` or by its own name."""
    path, _, name = place.partition("::")
    if not (ROOT / path).is_file():
        return False
    body = ast.parse((ROOT / path).read_text()).body
    for part in name.split(".") if name else ():
        for node in body:
            names = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            if part in names:
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True


def test_the_page_names_places() -> None:
    assert len(PLACES) > 20


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_the_page_is_there(place: str) -> None:
    assert defined(place)


@pytest.mark.parametrize("question", WHERE)
def test_every_question_has_its_place(question: str) -> None:
    assert defined(WHERE[question])
