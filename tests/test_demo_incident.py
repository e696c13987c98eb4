"""The demo's faults: FP8 suffers, the fallback saves the run, and says what it did."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lightning_fp.demo.incident import LOST, incident_table, run_incident
from lightning_fp.records.events import read_events


@pytest.mark.slow  # `make demo` runs it; the parts are tested in tests/callbacks
def test_the_incident_is_shown_step_by_step_and_ends_well(tmp_path: Path):
    console = Console(file=StringIO(), width=200)
    result = run_incident(tmp_path, console)
    shown = console.file.getvalue()
    kinds = [event.kind for event in read_events(tmp_path)]
    for kind in ("limit", "suspect", "replay", "verdict", "demote", "rollback", "state"):
        assert kind in kinds
        assert f"{kind} " in shown or f"{kind}:" in shown
    (demotion,) = read_events(tmp_path, kinds=["demote"])
    assert demotion.layers == (LOST,)
    assert result.gap(result.unprotected) > 0.05
    assert result.gap(result.rescued) < 0.01
    json.dumps(result.to_dict(), allow_nan=False)
    console.print(incident_table(result))
