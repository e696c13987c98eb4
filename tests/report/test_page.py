"""The page: complete, offline, readable whatever the records look like."""

from __future__ import annotations

import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_fp.records import EventWriter, LossRow, LossWriter, StageChange
from lightning_fp.records.events import GateResult
from lightning_fp.records.gradients import GradientRow, GradientShares, append_gradients
from lightning_fp.records.mismatch_rows import COLUMNS, MismatchWriter
from lightning_fp.records.run import LayerInfo, RunInfo, write_run
from lightning_fp.report import read_records, terminal_summary, write_report
from lightning_fp.report.page import read_runs
from lightning_fp.report.read.cost import run_cost
from lightning_fp.report.sections.every_section import sections

SECTIONS = 12


class Page(HTMLParser):
    """What a browser would find in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


def parts(text: str) -> int:
    """Sections that are there, and those of which it says why they are not."""
    lacking = re.findall(r"<li><b>([^<]*)</b>: ", text)
    named = sum(len(titles.split(", ")) for titles in lacking)
    return len(re.findall(r'<section id="(?!(?:run\d-)?lacking)', text)) + named


def page_of(*run_dirs: Path, to: Path) -> tuple[str, Page]:
    text = write_report(run_dirs, to / "out" / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_complete_and_offline(made_up: Path, tmp_path: Path) -> None:
    text, page = page_of(made_up, to=tmp_path)
    assert page.open == []
    assert parts(text) == SECTIONS
    assert not page.values("src")
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert page.tags.count("th") == page.values("scope").count("col") > 0
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href") if value[0] == "#"} <= set(ids)


def test_every_section_without_records_says_what_to_do(tmp_path: Path) -> None:
    LossWriter(tmp_path).append([LossRow(step=1, loss=3.0)])
    records = read_records(tmp_path)
    found = sections(records, run_cost(records))
    assert len(found) == SECTIONS
    missing = [section for section in found if section.missing]
    assert {s.id for s in found} - {s.id for s in missing} == {"loss", "cost"}
    for section in missing:
        assert re.match(r"Not recorded: (add|train with) \w+\(", section.missing)


def test_names_from_a_run_do_no_harm(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><b>"
    layer = LayerInfo(name=evil, format="fp8-delayed", kernel="", flops_share=None)
    write_run(tmp_path, RunInfo(step=0, layers=(layer,)))
    LossWriter(tmp_path).append([LossRow(step=step, loss=3.0) for step in range(9)])
    EventWriter(tmp_path).append(StageChange(step=3, reason=evil, stage=evil, previous=""))
    text, page = page_of(tmp_path, to=tmp_path)
    assert "alert(1)</script>" not in text
    assert page.tags.count("script") == 2


def test_stages_and_gates(tmp_path: Path) -> None:
    log = EventWriter(tmp_path)
    log.append(StageChange(step=0, reason="", stage="bf16", previous=""))
    numbers = {"value": 0.02, "below": 0.01, "window": 100.0}
    gate = GateResult(
        step=50, reason="too much", stage="bf16", statistic="clamped_mass", passed=False,
        numbers=numbers,
    )  # fmt: skip
    log.append(gate)
    log.append(StageChange(step=80, reason="", stage="fp8", previous="bf16"))
    records = read_records(tmp_path)
    section = {s.id: s for s in sections(records, run_cost(records))}["stages"]
    (chart,), (table,) = section.charts, section.tables
    assert [part["name"] for part in chart["rows"][0]["segments"]] == ["bf16", "fp8"]
    assert chart["lanes"][0]["marks"][0]["shape"] == "gate_failed"
    row = ["50", "bf16", "clamped mass", "2%", "below 1%", "failed"]
    assert table.rows == [row]


def test_evaluation_and_mismatch(tmp_path: Path) -> None:
    (tmp_path / "eval_gap.csv").write_text("step,loss,loss_high,gap\n10,2.2,2.0,0.1\n20,2,2,0\n")
    (tmp_path / "mismatch.csv").write_text("step,k3_kl,new\n10,0.1,\n20,0.3,\n")
    records = read_records(tmp_path)
    found = {s.id: s for s in sections(records, run_cost(records))}
    assert found["evaluation"].charts[0]["panels"][1]["series"][0]["values"] == [10.0, 0.0]
    assert found["mismatch"].tables[0].rows == [["k3_kl", "0.3", "0.3"]]


def test_the_usual_measures_of_the_mismatch_come_first(tmp_path: Path) -> None:
    values = dict.fromkeys(COLUMNS[1:], 0.5)
    MismatchWriter(tmp_path).append(3, values)
    records = read_records(tmp_path)
    (chart,) = {s.id: s for s in sections(records, run_cost(records))}["mismatch"].charts
    titles = [panel["title"] for panel in chart["panels"]]
    assert titles[:3] == ["k3_kl", "logprob_abs_diff_mean", "kl"]
    assert len(titles) == 6


def test_gradients_in_fp16(made_up: Path, tmp_path: Path) -> None:
    for step, scale, lost in ((0, 2.0**16, 0.0), (64, math.inf, 0.25)):
        of = GradientShares(zero=0.125, subnormal=0.5, overflow=lost)
        layers = {"a": of, "": GradientShares(zero=0.0, subnormal=0.0, overflow=0.0)}
        append_gradients(tmp_path, GradientRow(step=step, scale=scale, layers=layers))
    records = read_records(tmp_path)
    section = {s.id: s for s in sections(records, run_cost(records))}["gradients"]
    scale, shares = section.charts[0]["panels"]
    assert scale["series"][0]["values"] == [2.0**16, None]
    assert [line["values"] for line in shares["series"]] == [[12.5, 12.5], [50.0, 50.0]]
    (table,) = section.tables
    assert table.rows == [
        ["a", "25.0%", "50.0%", "12.5%"],
        ["the model itself", "0%", "0%", "0%"],
    ]
    text, _ = page_of(tmp_path, to=tmp_path)
    assert parts(text) == SECTIONS + 1
    assert "Gradients in the range of FP16" in text
    assert "gradients" not in page_of(made_up, to=tmp_path)[1].values("id")


def test_runs_compared(made_up: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    LossWriter(other).append([LossRow(step=s, loss=1.0, seconds=0.05) for s in range(1, 641)])
    text, page = page_of(made_up, other, to=tmp_path)
    assert parts(text) == 1 + 2 * SECTIONS
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert "against the first run" in text


def test_the_only_run_in_high_precision_is_the_baseline(made_up: Path, tmp_path: Path) -> None:
    high = tmp_path / "high"
    layer = LayerInfo(name="a", format="bf16", kernel="", flops_share=None)
    write_run(high, RunInfo(step=0, layers=(layer,)))
    LossWriter(high).append([LossRow(step=s, loss=1.0, seconds=0.3) for s in range(1, 99)])
    _, (cost, own) = read_runs([made_up, high])
    assert cost.raw_speedup == pytest.approx(3)
    assert own.raw_speedup is None
    _, (cost, _) = read_runs([made_up, made_up])
    assert cost.raw_speedup is None


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run must be a directory"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no records in"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "x.html")


def test_what_cannot_be_read_is_said(made_up: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made_up, run)
    (run / "loss.csv").write_text("step,loss\n1,2\nsomething else\n")
    part = next((run / "statistics").glob("*.parquet"))
    part.write_bytes(b"spoiled")
    text, _ = page_of(run, to=tmp_path)
    assert "loss.csv cannot be read" in text
    console = Console(record=True, width=120)
    terminal_summary([run], console)
    assert "loss.csv cannot be read" in console.export_text()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_records_cut_short_anywhere(
    data: st.DataObject, made_up: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("cut")
    (run / "statistics").symlink_to(made_up / "statistics")
    for name in ("events.jsonl", "run.jsonl", "loss.csv"):
        content = (made_up / name).read_bytes()
        kept = data.draw(st.integers(0, len(content)), label=name)
        (run / name).write_bytes(content[:kept])
    text, page = page_of(run, to=tmp_path_factory.mktemp("page"))
    assert parts(text) == SECTIONS
    assert page.open == []


def test_the_terminal_needs_no_jinja2(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)  # as if not installed
    console = Console(record=True, width=120)
    terminal_summary([made_up], console)
    text = console.export_text()
    assert len(text.splitlines()) <= 45  # a screenful
    for part in ("kept", "safer format", "fp8-dynamic (step 326)", "clamped mass", "cost:"):
        assert part in text
    with pytest.raises(ImportError, match="pip install jinja2"):
        write_report([made_up], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_final_loss_of_a_run_that_ended_in_nan(tmp_path: Path) -> None:
    LossWriter(tmp_path).append(
        [LossRow(step=step, loss=float("nan") if step > 50 else 2.0) for step in range(1, 101)]
    )
    records = read_records(tmp_path)
    assert records.steps is not None
    assert records.steps.final_loss() is None
    assert torch.isfinite(records.steps.losses).sum() == 50
