"""Runs do today what they did when their traces were recorded, down to the last bit.

`python -m tests.golden check` says the same of all of them outside of pytest.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.golden import store
from tests.golden.cases import GOLDEN, run_case
from tests.golden.traces import differences


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if case.quick else pytest.mark.slow) for n, case in GOLDEN.items()],
)
def test_a_run_leaves_the_trace_that_was_recorded(name: str) -> None:
    if reason := store.not_comparable(name):
        pytest.skip(reason)
    found = store.check(name, run_case(name))
    assert not found, (
        f"{name}: {found}\nIf this is meant: python -m tests.golden record --only {name}, and say"
        " why in the commit"
    )


def test_every_case_has_a_trace_and_every_trace_a_case() -> None:
    assert {path.stem for path in store.TRACES.glob("*.json")} == set(GOLDEN)


def test_a_trace_tells_what_has_changed_where() -> None:
    before: dict[str, Any] = store.read("gan")
    after = copy.deepcopy(before)
    assert list(differences(before, after)) == []
    after["weights"] = "0"
    kinds = [(event["step"], event["kind"]) for event in before["events"]]
    skip, limit = kinds.index((80, "skip")), kinds.index((134, "limit"))
    after["events"][limit]["numbers"]["limit"] += 1e-12
    del after["events"][skip]
    after["formats"].append([240, {"generator.0": "bf16"}])
    after["callbacks"]["New"] = {"version": 1}
    told = "\n".join(differences(before, after))
    assert f"events[{skip}] (step 80, skip): " in told
    assert f"events[{limit}] (step 134, limit).numbers.limit: 0.01 -> 0.010000000001" in told
    assert '(step 240): [240, {"generator.0": "bf16"}] is new' in told
    assert f'weights: "{before["weights"]}" -> "0"' in told
    assert 'callbacks.New: {"version": 1} is new' in told
    assert len(told.splitlines()) == 5


def test_a_trace_of_another_machine_is_not_compared(tmp_path: Any) -> None:
    content = store.read("gan")
    content["machine"]["cpu"] = "AVX9000"
    (tmp_path / "gan.json").write_text(store.to_json(content))
    reason = store.not_comparable("gan", tmp_path)
    assert "AVX9000" in reason
    assert "python -m tests.golden record --traces" in reason
