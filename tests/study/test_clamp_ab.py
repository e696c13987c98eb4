"""The A/B: an injected outlier clamps one layer under delayed scaling, and harms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.cli import main
from lightning_fp.records import read_statistics
from lightning_fp.study import ClampAB, clamp_ab, find_spikes, read_loss
from tests.study import outliers

FACTORY = f"{outliers.__file__}:build"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClampAB, Path]:
    output = tmp_path_factory.mktemp("ab")
    return clamp_ab(outliers.build, "inner", steps=outliers.STEPS, output=output), output


def test_clamping_in_the_layer_with_outliers_harms(study: tuple[ClampAB, Path]):
    result, output = study
    assert result.outcome == "harmful"
    assert result.layers == ("inner",)
    assert (result.a.format, result.b.format) == ("fp8-delayed", "fp8-dynamic")
    assert result.a.spikes >= 2
    assert result.b.spikes == 0
    assert result.a.clamped_mass_max > 0.5
    assert result.a.overflow_bits > 4
    assert result.b.clamped_mass_max == 0
    assert result.loss_difference < 0
    assert "Clamping in inner harms this run: with fp8-dynamic instead of" in result.verdict
    assert json.loads((output / "clamp_ab.json").read_text()) == result.to_dict()


def test_the_arms_leave_records_that_the_analysis_reads(
    study: tuple[ClampAB, Path], capsys: pytest.CaptureFixture[str]
):
    result, output = study
    loss = read_loss(output / "a")
    assert loss.values.tolist() == list(result.a.losses)
    assert {spike.step for spike in find_spikes(loss)} <= set(outliers.OUTLIERS)
    rows = read_statistics(output / "a").to_pylist()
    clamped = {row["step"] for row in rows if (row["clamped_mass"] or 0) > 0.5}
    assert clamped == set(outliers.OUTLIERS)
    assert main(["study", "clamp", str(output / "a"), "--window", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ties"][0]["layer"], found["ties"][0]["operand"]) == ("inner", "input")
    assert found["resolution"] == 1


def test_the_same_run_twice_is_the_same(tmp_path: Path):
    options = {"steps": 32, "output": tmp_path, "every_n_steps": 4}
    result = clamp_ab(outliers.build_clipped, ["in*"], switch_to="fp8-delayed", **options)
    assert result.a == result.b
    assert result.outcome == "harmless"
    assert result.loss_noise == 0


def test_a_run_that_does_not_clamp_settles_nothing(study: tuple[ClampAB, Path]):
    result, _ = study
    quiet = dataclasses.replace(result.a, clamped_mass_max=0.0, overflow_bits=0.01)
    nothing = dataclasses.replace(result, a=quiet)
    assert nothing.outcome == "no clamping"
    assert "settles nothing" in nothing.verdict


def test_outcomes(study: tuple[ClampAB, Path]):
    result = dataclasses.replace(study[0], loss_noise=0.01)
    a = dataclasses.replace(result.a, final_loss=1.0, spikes=4, nonfinite_steps=0)

    def outcome(**b: float) -> str:
        return dataclasses.replace(result, a=a, b=dataclasses.replace(a, **b)).outcome

    assert outcome() == outcome(final_loss=0.995) == outcome(spikes=3) == "harmless"
    assert outcome(final_loss=0.98) == outcome(spikes=2) == "harmful"
    assert outcome(final_loss=1.02, spikes=0) == outcome(nonfinite_steps=1) == "worse"


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    for factory, layers, options, message in (
        (outliers.build, "inner", {"steps": 0}, "steps must be at least 1"),
        (outliers.build, [], {}, "layers must name the suspected layers"),
        (outliers.build, "nope*", {}, "matches no linear layer"),
        (outliers.build, "inner", {"rules": {"inner": "bf16"}}, "must be under delayed scaling"),
        (outliers.build_model_only, "inner", {}, "must return a LightningModule, a dataloader"),
        (lambda: (outliers.Outliers(), []), "inner", {}, "the run made no step"),
    ):
        with pytest.raises(ValueError, match=message):
            clamp_ab(factory, layers, **{"steps": 2, **options}, output=tmp_path / "refused")


# --- the command --------------------------------------------------------------------------------


def test_command_reads_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=60,
        log_every_n_steps=1,
        plugins=FP8Precision("delayed"),
        callbacks=[ClampMonitor(every_n_steps=4)],
        logger=CSVLogger(tmp_path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(*outliers.build())
    command = ["study", "clamp", str(tmp_path), "--statistic", "overflow_bits", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert {spike["step"] for spike in found["spikes"]} <= set(outliers.OUTLIERS)
    assert (found["ties"][0]["layer"], found["ties"][0]["operand"]) == ("inner", "input")
    assert found["ties"][0]["curve"][8] > 4
    assert main([*command, "--column", "val_loss"]) == 2
    assert "has no column 'val_loss'" in capsys.readouterr().err


def test_command_trains_and_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--layers", "inner", "--steps", "33", "--seed", "1", "--output", str(tmp_path)]
    assert main(["study", "clamp", "--ab", FACTORY, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "A: fp8-delayed" in printed
    assert "33 steps, seed 1." in printed
    assert json.loads((tmp_path / "clamp_ab.json").read_text())["seed"] == 1
    assert main(["study", "clamp", str(tmp_path / "a"), "--statistic", "overflow_bits"]) == 0
    assert "a row of the statistics covers 1 step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either RUN"),
        (["run", "--ab", FACTORY], "give either RUN"),
        (["nowhere"], "no statistics in 'nowhere'"),
        (["nowhere", "--layers", "inner"], "--layers and --rule belong to --ab"),
        (["nowhere", "--threshold", "0"], "threshold must be greater than 0"),
        (["nowhere", "--top", "0"], "--top must be at least 1"),
        (["--ab", FACTORY], "layers must name the suspected layers"),
        (["--ab", f"{outliers.__file__}:nope"], "has no 'nope'"),
    ],
)
def test_command_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["study", "clamp", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)
