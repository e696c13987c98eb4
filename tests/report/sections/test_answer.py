"""The top of a report: was it safe, what did it cost, and what to set next time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_fp.events import (
    Demotion,
    FormatChange,
    LayerClimb,
    Note,
    Promotion,
    StageChange,
    Started,
    Verdict,
    WatchFailed,
)
from lightning_fp.records import Event, LossRow, LossWriter
from lightning_fp.records.events import EventWriter
from lightning_fp.records.mismatch_rows import COLUMNS, MismatchWriter
from lightning_fp.records.run import LayerInfo, RunInfo, write_run
from lightning_fp.report.page import read_runs, write_report
from lightning_fp.report.read.cost import run_cost
from lightning_fp.report.sections.answer import Answer, answer
from lightning_fp.report.sections.headline import headline, key_figures
from lightning_fp.report.sections.setting import LATE
from lightning_fp.report.sections.title import particulars, title

STARTED = Started(step=0, reason="watching")
ENDED = Note(step=100, reason="", numbers={"attempted": 100.0, "useful": 100.0})
TO_BF16 = {"b": ("fp8-delayed", "bf16")}


def run(
    directory: Path,
    *events: Event,
    loss: float = 2.0,
    format: str = "fp8-delayed",
    kernel: str = "native",
    seconds: float = 0.1,
) -> Path:
    """100 steps of a model with two layers."""
    layers = tuple(
        LayerInfo(
            name=name,
            format=format,
            kernel=kernel,
            flops_share=0.5,
            reason="the format of the run" if format == "bf16" else None,
        )
        for name in "ab"
    )
    settings = {"FP8Precision": {"scaling": format, "layers": {"*head": "bf16"}}}
    info = RunInfo(
        step=0, model="GPT", settings=settings, layers=layers, parameters=8_030_000, device="H100"
    )
    write_run(directory, info)
    LossWriter(directory).append(
        LossRow(step=step, loss=loss, seconds=seconds) for step in range(1, 101)
    )
    log = EventWriter(directory)
    for event in events:
        log.append(event)
    return directory


def answered(directory: Path, baseline: Path | None = None) -> Answer:
    (records,), _ = read_runs([directory], baseline)
    return answer(records)


def test_safe(tmp_path: Path) -> None:
    found = answered(run(tmp_path / "ended", STARTED, ENDED))
    assert (found.tone, found.word) == ("good", "Safe over 100 steps")
    assert found.advice == LATE
    dynamic = answered(run(tmp_path / "dynamic", STARTED, ENDED, format="fp8-dynamic"))
    assert (dynamic.tone, dynamic.advice) == ("good", "")
    goes_on = answered(run(tmp_path / "goes on", STARTED))
    assert (goes_on.word, goes_on.setting) == ("Safe so far, over 100 steps", "")
    assert found.setting == 'FP8Precision("delayed", layers={"*head": "bf16"})'
    assert found.cost.startswith("What it costs in loss is not known: the report has no baseline")


def test_a_short_run_is_not_judged(tmp_path: Path) -> None:
    log = LossWriter(tmp_path)
    log.append(LossRow(step=step, loss=1.0) for step in range(1, 64))
    layer = LayerInfo(name="a", format="fp8-delayed", kernel="", flops_share=None)
    write_run(tmp_path, RunInfo(step=0, layers=(layer,)))
    EventWriter(tmp_path).append(STARTED)
    found = answered(tmp_path)
    assert (found.tone, found.word) == ("open", "Too short to judge: the watch learns for 64 steps")


@pytest.mark.parametrize(("grows", "tone"), [(0.0, "good"), (3.0, "changed")])
def test_training_and_rollout_that_drift_apart(grows: float, tone: str, tmp_path: Path) -> None:
    directory = run(tmp_path, STARTED, ENDED)
    log = MismatchWriter(directory)
    for step in range(1, 101):
        log.append(step, dict.fromkeys(COLUMNS[1:], 1e-3 * math.exp(grows * step / 100)))
    found = answered(directory)
    assert found.tone == tone
    page = write_report([directory], tmp_path / "r.html").read_text()
    assert ("<code>lightning-fp mismatch RUN</code>" in page) == (tone == "changed")


def test_much_loss_is_not_safe(tmp_path: Path) -> None:
    baseline = run(tmp_path / "baseline", format="bf16")
    found = answered(run(tmp_path / "run", STARTED, ENDED, loss=2.1), baseline)
    assert (found.tone, found.word) == ("changed", "Nothing broke, but the loss is higher")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (2.01, "The final loss is 0.50% higher than the baseline's."),
        (2.0, "It costs no loss: it ends where the baseline does."),
        (1.98, "It costs no loss: the final loss is 1.00% lower than the baseline's."),
    ],
)
def test_what_it_costs(loss: float, said: str, tmp_path: Path) -> None:
    baseline = run(tmp_path / "baseline", format="bf16")
    assert answered(run(tmp_path / "run", STARTED, loss=loss), baseline).cost == said


def test_a_baseline_that_is_shorter_says_nothing_of_the_loss(tmp_path: Path) -> None:
    LossWriter(tmp_path / "short").append([LossRow(step=1, loss=9.0)])
    assert answered(run(tmp_path / "run", STARTED), tmp_path / "short").cost == ""


def test_without_a_watch_it_is_not_called_safe(tmp_path: Path) -> None:
    found = answered(run(tmp_path))
    assert (found.tone, found.word) == ("open", "FP8 trained; nobody watched for harm")
    assert found.advice == "Add PrecisionFallback() to the callbacks to have it watched."


def test_low_precision_that_was_taken_back_is_a_result_however_short_the_run(
    tmp_path: Path,
) -> None:
    on = FormatChange(step=36, reason="", formats={n: ("bf16", "fp8-delayed") for n in "ab"})
    apart = "training and inference drifted apart"
    off = FormatChange(step=41, reason=apart, formats={n: ("fp8-delayed", "bf16") for n in "ab"})
    found = answered(run(tmp_path, STARTED, on, off))
    assert found.tone == "changed"
    assert found.word == "FP8 was taken back at step 41, and not turned on again"
    assert found.advice == "Training and inference drifted apart."


def test_saved(tmp_path: Path) -> None:
    verdict = Verdict(step=50, reason="harm", verdict="precision", tier="control")
    demotion = Demotion(step=50, reason="to blame", formats=TO_BF16)
    found = answered(run(tmp_path, STARTED, verdict, demotion))
    assert (found.tone, found.word) == ("changed", "Saved: 1 of 2 layers needed a safer format")
    assert found.setting == 'FP8Precision("delayed", layers={"b": "bf16", "*head": "bf16"})'


def test_layers_over_a_limit(tmp_path: Path) -> None:
    climb = LayerClimb(step=9, reason="clamps", formats={n: ("fp8-delayed", "e") for n in "ab"})
    found = answered(run(tmp_path, STARTED, climb))
    assert found.word == "Safe after a change: 2 of 2 layers needed a safer format"


def test_layers_that_a_rollout_took_out_of_fp8_again(tmp_path: Path) -> None:
    """The setting must not send them back to where their gate failed."""
    both, one = ({n: ("bf16", "fp8-delayed") for n in names} for names in ("ab", "a"))
    started = FormatChange(step=0, reason="", formats={n: ("fp8-delayed", "bf16") for n in "ab"})
    events = [
        *(STARTED, started, StageChange(step=0, reason="", stage="high", previous="")),
        *(FormatChange(step=20, reason="", formats=one),),
        *(StageChange(step=20, reason="", stage="some", previous="high"),),
        *(FormatChange(step=40, reason="", formats={"b": both["b"]}),),
        *(StageChange(step=40, reason="", stage="all", previous="some"),),
        *(StageChange(step=60, reason="clamps", stage="some", previous="all"),),
        *(FormatChange(step=60, reason="", formats=TO_BF16), ENDED),
    ]
    (records,), _ = read_runs([run(tmp_path / "back", *events)], None)
    found = answer(records)
    assert found.word == "Safe after a change: the rollout took 1 of 2 layers back"
    assert found.setting == 'FP8Precision("delayed", layers={"b": "bf16", "*head": "bf16"})'
    climb = LayerClimb(step=30, reason="clamps", formats={"a": ("fp8-delayed", "fp8-dynamic")})
    both_ways = answered(run(tmp_path / "both", *events[:-1], climb, ENDED))
    assert both_ways.word == (
        "Safe after a change: 1 of 2 layers needed a safer format, 1 went back with its stage"
    )
    said = headline(records, run_cost(records))
    assert "The rollout did not finish: at step 60 it went back to stage 'some'." in said
    again = StageChange(step=80, reason="", stage="all", previous="some")
    done = FormatChange(step=80, reason="", formats={"b": both["b"]})
    (records,), _ = read_runs([run(tmp_path / "again", *events, again, done)], None)
    assert answer(records).word == "Safe over 100 steps"
    assert "did not finish" not in headline(records, run_cost(records))


def test_layers_that_rules_kept_out_of_fp8(tmp_path: Path) -> None:
    directory = run(tmp_path, STARTED, ENDED, format="bf16")
    (records,), _ = read_runs([directory], None)
    found = answer(records)
    assert (found.tone, found.word) == ("open", "A run in high precision")
    assert found.advice.startswith("Every layer was left in it (the format of the run).")
    assert title(records) == "GPT in bf16"


def test_a_layer_that_got_its_format_back_needs_no_rule(tmp_path: Path) -> None:
    back = Promotion(step=80, reason="", formats={"b": ("bf16", "fp8-delayed")})
    found = answered(run(tmp_path, STARTED, Demotion(step=50, reason="", formats=TO_BF16), back))
    assert '"b"' not in found.setting


def test_many_layers_are_told_in_words(tmp_path: Path) -> None:
    formats = {f"layer{i}": ("fp8-delayed", "bf16") for i in range(9)}
    found = answered(run(tmp_path, STARTED, Demotion(step=50, reason="", formats=formats)))
    assert found.setting == ""
    assert found.advice == "Give the 9 layers under FP8 the format they ended in."


def test_bad_ends(tmp_path: Path) -> None:
    lost = answered(run(tmp_path / "lost", STARTED, loss=math.nan))
    assert (lost.tone, lost.word) == ("bad", "The loss is not finite")
    failed = answered(run(tmp_path / "failed", STARTED, WatchFailed(step=7, reason="")))
    assert (failed.tone, failed.word) == ("bad", "Unprotected from step 7")
    high = answered(run(tmp_path / "high", format="bf16"))
    assert (high.tone, high.word) == ("open", "A run in high precision")


def test_title_and_particulars(tmp_path: Path) -> None:
    (records,), (cost,) = read_runs([run(tmp_path, STARTED)])
    assert title(records) == "GPT in FP8 (fp8-delayed)"
    date, *others = particulars(records, cost)
    assert date.startswith("20")
    assert others == ["10 s", "H100", "8.0M parameters", str(tmp_path)]
    page = write_report([tmp_path], tmp_path / "r.html").read_text()
    assert "<h1>GPT in FP8 (fp8-delayed)</h1>" in page
    assert '<div class="answer good">' in page


def test_an_emulated_run_has_no_speed_tiles(tmp_path: Path) -> None:
    baseline = run(tmp_path / "baseline", format="bf16", kernel="nn.Linear", seconds=0.2)
    for kernel, shown in (("native", True), ("native (emulated)", False)):
        directory = run(tmp_path / kernel, STARTED, kernel=kernel)
        (records,), (cost,) = read_runs([directory], baseline)
        figures = {name for name, _, _ in key_figures(records, cost)}
        assert ({"time per step", "speed-up"} <= figures) == shown
        assert ("2.00x" in headline(records, cost)) == shown
        page = write_report([directory], tmp_path / "r.html", baseline=baseline).read_text()
        assert ("2.00x" in page) == shown


def test_the_baseline_is_in_the_first_chart_with_its_last_value(tmp_path: Path) -> None:
    from lightning_fp.report.sections.over_time import loss_section

    baseline = run(tmp_path / "baseline", format="bf16")
    (records,), _ = read_runs([run(tmp_path / "run", STARTED, loss=2.5)], baseline)
    lines = loss_section(records).charts[0]["panels"][0]["series"]
    assert [(line["name"], line["last"]) for line in lines] == [
        ("this run", 2.5),
        ("baseline (dots)", 2.0),
    ]


def test_what_went_wrong_without_fp8_is_not_called_safe(tmp_path: Path) -> None:
    verdict = Verdict(step=50, reason="it rises too", verdict="not precision", tier="trajectory")
    harmless = Note(step=50, reason="formats stay as they are; the error does not harm the loss")
    assert answered(run(tmp_path / "a", STARTED, verdict, harmless, ENDED)).tone == "good"
    cleared = Note(step=50, reason="formats stay as they are; it looks like the data")
    found = answered(run(tmp_path / "b", STARTED, verdict, cleared, ENDED))
    assert found.tone == "changed"
    assert found.word == "No harm from FP8 over 100 steps; something else went wrong at step 50"
    assert found.advice == "It looks like the data."
