"""From a sweep to a recipe, and what a rollout makes of its evidence."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback, StagedRollout
from lightning_fp.loop import PrecisionLoop
from lightning_fp.recipes import FormatEvidence, RolloutRecipe, Stage, json_schema
from lightning_fp.records import read_events
from lightning_fp.report import write_report
from lightning_fp.study.emit import recipe_of
from lightning_fp.study.sweep.findings import find
from tests.study.cells import STEPS, row
from tests.study.sweep.factories import Fit, batches

HIGH = [row("bf16", lr, seed, {1e-3: 2.5, 1e-2: 2.6}[lr]) for lr in (1e-3, 1e-2) for seed in "012"]


def swept(**finals: dict[float, float | None]):
    low = [
        row(format.replace("_", "-"), lr, seed, final)
        for format, by_rate in finals.items()
        for lr, final in by_rate.items()
        for seed in "012"
    ]
    return find([*HIGH, *low], STEPS)


FOUND = swept(
    e8m3={1e-3: 2.7, 1e-2: None},
    fp8_delayed={1e-3: 2.51, 1e-2: None},
    fp8_dynamic={1e-3: 2.5, 1e-2: 2.6},
)


def test_the_first_that_passes_is_taken_and_all_are_told() -> None:
    recipe = recipe_of(FOUND)
    assert RolloutRecipe.from_yaml(recipe.to_yaml()) == recipe
    assert {each.format: each.passed for each in recipe.evidence} == {
        "e8m3": False,
        "fp8-delayed": True,
        "fp8-dynamic": True,
    }
    assert {format for stage in recipe.stages for format in stage.layers.values()} == {
        "high",
        "fp8-delayed",
    }
    e8m3, delayed, dynamic = recipe.evidence
    assert (delayed.lr_low, delayed.lr_high) == (1e-3, 1e-3)
    assert (dynamic.lr_low, dynamic.lr_high) == (1e-3, 1e-2)
    assert delayed.gap == pytest.approx(0.004)
    assert "8.0% higher" in e8m3.why
    assert recipe.stages[-1].gates, "limits go on asking"


def test_nothing_passes() -> None:
    recipe = recipe_of(swept(e8m3={1e-3: None, 1e-2: None}))
    assert recipe.stages[0].layers == {"*": "high"}
    (evidence,) = recipe.evidence
    assert "3 of 3 runs fail, of bf16 0 of 3" in evidence.why


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("e8m3", 1e-3, 0, 2.5)], "needs bf16"),
        (HIGH, "needs a format beside bf16"),
    ],
)
def test_what_no_recipe_follows_from(rows, said) -> None:
    with pytest.raises(ValueError, match=said):
        recipe_of(find(rows, STEPS))


def against(format: str) -> RolloutRecipe:
    """A recipe that goes where its own evidence says it should not."""
    evidence = FormatEvidence(format=format, passed=False, failed=4, runs=15, steps=200, why="bad")
    return RolloutRecipe(
        name="daring", stages=(Stage(name="all", layers={"*": format}),), evidence=(evidence,)
    )


def fit(rollout: StagedRollout, tmp_path: Path, steps: int = 2) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        plugins=FP8Precision("fp8-dynamic"),
        callbacks=[ClampMonitor(), PrecisionFallback(), rollout],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Fit(1e-3), batches())
    return trainer


def test_a_rollout_refuses_what_has_not_passed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="e8m3, which has not passed: e8m3 failed in 4 of 15 runs"):
        fit(StagedRollout(against("e8m3")), tmp_path)


def test_unless_it_is_forced_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = against("e8m3")
    unused = FormatEvidence(format="e8m2", passed=False, failed=1, runs=15, steps=200)
    recipe = replace(recipe, evidence=(*recipe.evidence, unused))
    trainer = fit(StagedRollout(recipe, force=True), tmp_path)
    formats = trainer.precision_plugin.precision_map.formats()
    assert set(formats.values()) == {"e8m3"}
    said = "e8m3 is forced against the recipe's evidence: e8m3 failed in 4 of 15 runs of 200 steps"
    (line,) = [each for each in caplog.records if "is forced" in each.message]
    assert said in line.message
    assert line.levelname == "WARNING"
    directory = tmp_path / "runs" / "Fit" / "version_0"
    (note,) = [each for each in read_events(directory, kinds=["note"]) if said in each.reason]
    page = write_report([directory], tmp_path / "report.html").read_text()
    assert note.reason in html.unescape(page)


def test_configured_formats_and_other_spellings_are_seen(tmp_path: Path) -> None:
    recipe = against("dynamic")
    configured = RolloutRecipe(
        name="as-configured",
        stages=(Stage(name="all", layers={"*": "configured"}),),
        evidence=recipe.evidence,
    )
    with pytest.raises(ValueError, match="which has not passed"):
        fit(StagedRollout(configured), tmp_path)


def test_a_plain_loop_refuses_too() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="which has not passed"):
        PrecisionLoop(model, optimizer, "dynamic", recipe=against("e8m3"))


def test_the_emitted_recipe_runs_and_says_what_it_cannot_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fit(StagedRollout(recipe_of(FOUND)), tmp_path, steps=20)
    assert "about 200 billion tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "fp9"}, "fp9"),
        ({"passed": "yes"}, "passed must be True or False"),
        ({"runs": -1}, "runs must be a count"),
        ({"gap": float("nan")}, "gap must be a number or None"),
        ({"why": 3}, "why must be a text"),
    ],
)
def test_evidence_that_is_none(changes: dict, said: str) -> None:
    values = {"format": "e8m3", "passed": False, "failed": 1, "runs": 2, "steps": 3}
    with pytest.raises(ValueError, match=said):
        FormatEvidence(**{**values, **changes})


def test_evidence_in_yaml_names_its_place_and_the_schema_knows_it() -> None:
    text = against("e8m3").to_yaml()
    with pytest.raises(
        ValueError, match=r"evidence\[0\]: there is no field 'rnus'; did you mean 'runs'"
    ):
        RolloutRecipe.from_yaml(text.replace("runs:", "rnus:"))
    assert "evidence" in json_schema()["properties"]
    assert json_schema()["$defs"]["FormatEvidence"]["properties"]["passed"]["type"] == "boolean"
