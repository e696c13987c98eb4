"""From signal to demotion no module is entered twice."""

from __future__ import annotations

from pathlib import Path

from tests.rescue_trace import trace_of_one_rescue


def test_no_module_is_entered_twice(tmp_path: Path) -> None:
    trace = trace_of_one_rescue(tmp_path)
    assert not trace.again
    rescue = ("supervisor", "arrivals", "incident_log", "carry_out", "demotion")
    wanted = {f"lightning_fp.stability.supervise.{name}" for name in rescue}
    wanted |= {"lightning_fp.stability.watch", "lightning_fp.stability.answers"}
    assert wanted <= trace.entered.keys()
