"""StagedRollout in a real Trainer: the map over time, resumes, gates, and the fallback."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback, recipes
from lightning_fp.callbacks import EvaluationGap, ParityProbe
from lightning_fp.callbacks.rollout.staged_rollout import STAGE, StagedRollout
from lightning_fp.demo import ByteBatches
from lightning_fp.recipes import Gate, Rollout, RolloutRecipe, Stage
from lightning_fp.records import (
    FormatChange,
    GateResult,
    Loss,
    Note,
    StageChange,
    read_events,
    write_loss,
)
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from lightning_fp.telemetry.rollout.stage_moves import follow
from tests.helper import (
    CONTEXT,
    LanguageModel,
    make_trainer,
    same_weights,
    supervisor_of,
    text_rows,
)

HIGH, LOW = {"*": "high"}, {"*": "configured"}
FC1 = "model.blocks.1.fc1"


def batches(count: int, seed: int = 0) -> ByteBatches:
    text = text_rows(3000).flatten()
    return ByteBatches(text, batches=count, batch_size=4, context=CONTEXT, seed=seed)


class Course(L.Callback):
    """Notes the formats of every step, and the losses; saves checkpoints after some."""

    def __init__(self, save_after: dict[int, Path] | None = None) -> None:
        self.save_after = save_after or {}
        self.formats: dict[int, dict[str, str]] = {}

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        self.formats[trainer.global_step] = trainer.precision_plugin.precision_map.formats()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.save_after:
            trainer.save_checkpoint(self.save_after[trainer.global_step])


def train(
    rollout: StagedRollout,
    steps: int,
    *before: L.Callback,
    scaling: Any = "dynamic",
    ckpt: Path | None = None,
    save_after: dict[int, Path] | None = None,
    **options: Any,
) -> tuple[LanguageModel, Course, L.Trainer]:
    model, seen = LanguageModel(blocks=options.pop("blocks", 4)), Course(save_after)
    plugin = FP8Precision(scaling, base="32-true", layers=options.pop("layers", None))
    trainer = make_trainer(
        plugin,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[*before, rollout, seen],
        **options,
    )
    trainer.fit(model, batches(steps), ckpt_path=ckpt)
    return model, seen, trainer


def two_stages(*gates: Gate, steps: int = 4, on_fail: Any = "hold") -> RolloutRecipe:
    return RolloutRecipe(
        name="two",
        stages=(
            Stage(name="high", layers=HIGH, until={"steps": steps}, gates=gates, on_fail=on_fail),
            Stage(name="low", layers=LOW),
        ),
    )


# -- the map over time ----------------------------------------------------------------------------

SHORT: dict[str, tuple[dict[str, Any], int, Any]] = {
    # options, steps, scaling
    "conservative": ({"warmup": 0.1, "window": 4}, 30, "delayed"),
    "balanced": ({"warmup": 0.2, "window": 3}, 10, "dynamic"),
    "aggressive": ({"steps": 4, "window": 3}, 12, "delayed"),
    "first-last-bf16": ({}, 8, "dynamic"),
    "bf16-cooldown": ({"share": 0.6}, 12, "delayed"),
    "delayed-after-dynamic": ({"window": 4, "token_limit": 12 * 4 * (CONTEXT + 1)}, 18, "dynamic"),
}


def recipe_of(name: str) -> RolloutRecipe:
    """Short, and with bounds that a tiny model keeps."""
    recipe = recipes.get(name, **SHORT[name][0])
    text = recipe.to_yaml().replace("above: 15.0", "above: -99").replace("above: 0.95", "above: -1")
    return RolloutRecipe.from_yaml(text.replace("below: 0.01", "below: 0.9"))


def watching(name: str) -> list[L.Callback]:
    """The callbacks that a recipe's gates need."""
    watching: list[L.Callback] = []
    if name not in ("first-last-bf16", "bf16-cooldown"):
        what_if = name == "delayed-after-dynamic"
        watching += [ClampMonitor(every_n_steps=1, sample=1, what_if=what_if)]
    if name == "conservative":
        watching += [ParityProbe(every_n_steps=2, worst=0)]
    if name in ("conservative", "balanced"):
        watching += [PrecisionFallback(limit=None, probe_every_n_steps=None)]
    return watching


def check_course(name: str, tmp_path: Path, cuts: list[int] | None) -> None:
    """The whole run has the formats that the recipe states; runs cut at `cuts` go on the same."""
    recipe, (_, steps, scaling) = recipe_of(name), SHORT[name]
    paths = {step: tmp_path / f"{step}.ckpt" for step in cuts or range(1, steps)}
    rollout = StagedRollout(recipe, dirpath=tmp_path / "whole")
    model, seen, trainer = train(rollout, steps, *watching(name), scaling=scaling, save_after=paths)
    stated = follow(recipe, trainer.precision_plugin)
    changes = [e for e in read_events(tmp_path / "whole") if isinstance(e, StageChange)]
    assert [change.stage for change in changes] == [stage.name for stage in recipe.stages]
    starts = [change.step for change in changes]
    assert starts[0] == 0
    for step, formats in seen.formats.items():
        stage = sum(start <= step for start in starts) - 1
        assert formats == stated[stage].formats, (step, recipe.stages[stage].name)
    assert seen.formats[0]["model.lm_head"] == "fp32"  # as the plugin leaves it

    boundaries = sorted({*starts[1:], *(start + 1 for start in starts[1:]), steps // 2})
    for cut in boundaries if cuts is None else cuts:
        again, rest, _ = train(
            StagedRollout(recipe, dirpath=tmp_path / "again"),
            steps,
            *watching(name),
            scaling=scaling,
            ckpt=paths[cut],
        )
        assert rest.formats == {step: f for step, f in seen.formats.items() if step >= cut}, cut
        assert again.losses == model.losses[cut:], cut
        assert same_weights(again, model)


def test_balanced_does_what_it_states_and_resumes(tmp_path: Path) -> None:
    check_course("balanced", tmp_path, [2, 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_every_recipe_does_what_it_states_and_resumes_anywhere(name: str, tmp_path: Path) -> None:
    check_course(name, tmp_path, None)


def test_what_is_written_down(tmp_path: Path) -> None:
    monitor = ClampMonitor(every_n_steps=1)
    gate = Gate(statistic="fp8/clamped_mass/max", below=0.5, window=2)
    recipe = RolloutRecipe(
        name="three",
        stages=(
            Stage(name="high", layers=HIGH, until={"steps": 2}),
            Stage(name="ends", layers={"blocks[0]": "high", **LOW}, gates=(gate,)),
            Stage(name="all", layers=LOW),
        ),
    )
    shown: list[float] = []

    class Shown(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            shown.append(float(trainer.callback_metrics.get(STAGE, -1)))
            assert list(trainer.progress_bar_metrics) == ["fp8/share"]

    from lightning.pytorch.loggers import CSVLogger

    rollout = StagedRollout(recipe, dirpath=tmp_path)
    _, _, trainer = train(rollout, 8, monitor, blocks=2, logger=CSVLogger(tmp_path / "csv"))
    assert rollout.stage == "all"
    events = read_events(tmp_path, kinds=["stage", "gate", "format"])
    first, formats, *_ = events
    assert isinstance(first, StageChange)
    assert (first.step, first.stage, first.previous) == (0, "high", "")
    assert first.numbers["layers_changed"] == 8
    assert first.numbers["fp8_share"] == 0
    assert isinstance(formats, FormatChange)
    assert formats.formats[FC1] == ("fp8-dynamic", "fp32")
    assert len([e for e in events if isinstance(e, FormatChange)]) == 3  # once each
    (passed,) = [e for e in events if isinstance(e, GateResult)]
    assert (passed.step, passed.stage, passed.passed) == (4, "ends", True)
    assert passed.numbers == {"value": 0.0, "below": 0.5, "window": 2.0}
    last = [e for e in events if isinstance(e, StageChange)][-1]
    assert last.sentence() == "step 4: stage ends -> all: all gates pass; 4 layers change"
    assert last.numbers["fp8_share"] > 0.5
    table = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = table[0].split(",").index(STAGE)
    assert [row.split(",")[column] for row in table[1:] if row.split(",")[column]] == [
        *["0.0"] * 2,
        *["1.0"] * 2,
        *["2.0"] * 4,
    ]
    (run,) = [c for c in trainer.callbacks if isinstance(c, StagedRollout)]
    assert run.settings()["recipe"]["stages"][0] == {
        "name": "high",
        "layers": HIGH,
        "until": {"steps": 2},
    }


# -- gates ----------------------------------------------------------------------------------------


class Logs(LanguageModel):
    """Logs a metric that falls."""

    def training_step(self, batch: Any, index: int) -> Any:
        self.log("falling", 1.0 - 0.1 * self.global_step)
        return super().training_step(batch, index)


def stages_of(rollout: StagedRollout, tmp_path: Path) -> dict[int, str]:
    changes = [e for e in read_events(tmp_path) if isinstance(e, StageChange)]
    return {change.step: change.stage for change in changes}


def test_a_gate_that_fails_holds_and_says_why(tmp_path: Path) -> None:
    gate = Gate(statistic="falling", below=0.45, window=3)
    rollout = StagedRollout(two_stages(gate), dirpath=tmp_path)
    trainer = make_trainer(
        FP8Precision(base="32-true"), max_epochs=1, log_every_n_steps=1, callbacks=[rollout]
    )
    trainer.fit(Logs(), batches(14))
    # 0.4 is logged in the step after 6, and the last 3 values are below at 9
    assert stages_of(rollout, tmp_path) == {0: "high", 9: "low"}
    failed, passed = [e for e in read_events(tmp_path) if isinstance(e, GateResult)]
    assert (failed.step, failed.passed, passed.step, passed.passed) == (3, False, 9, True)
    assert failed.sentence() == (
        "step 3: gate of stage high fails: falling is 0.8, must be below 0.45 (worst of 3 steps);"
        " the stage goes on until it passes"
    )


def test_a_gate_without_data_holds_and_says_so(tmp_path: Path) -> None:
    gate = Gate(statistic="never_logged", below=1.0, window=3)
    rollout = StagedRollout(two_stages(gate), dirpath=tmp_path)
    train(rollout, 12)
    assert rollout.stage == "high"
    (missing,) = [e for e in read_events(tmp_path) if isinstance(e, GateResult)]
    assert not missing.passed
    assert missing.sentence() == (
        "step 3: gate of stage high fails: never_logged was not measured in the last 3 steps; the"
        " stage goes on until it is measured"
    )


def test_steps_back_restore_the_formats_and_end(tmp_path: Path) -> None:
    gate = Gate(statistic="sqnr_db/min", above=500.0, window=2)
    recipe = RolloutRecipe(
        name="back",
        stages=(
            Stage(name="high", layers=HIGH, until={"steps": 2}),
            Stage(name="low", layers=LOW, gates=(gate,), on_fail="step_back", max_tries=2),
        ),
    )
    rollout = StagedRollout(recipe, dirpath=tmp_path)
    _, seen, _ = train(rollout, 16, ClampMonitor(every_n_steps=1), scaling="delayed")
    assert stages_of(rollout, tmp_path) == {0: "high", 2: "low", 4: "high", 6: "low", 8: "high"}
    in_low = [step for step, formats in seen.formats.items() if formats[FC1] == "fp8-delayed"]
    assert in_low == [2, 3, 6, 7]
    assert rollout.state.ended == "stage 'low' was given up 2 times"
    notes = [e.reason for e in read_events(tmp_path) if isinstance(e, Note)]
    assert notes == ["the rollout ends in stage high: stage 'low' was given up 2 times"]


def test_a_loss_is_compared_with_a_recorded_run(tmp_path: Path) -> None:
    model, _, _ = train(StagedRollout(two_stages(steps=99)), 12, blocks=2)
    recorded = tmp_path / "bf16"
    write_loss(recorded, Loss.of(range(1, 13), model.losses))
    gate = Gate(statistic="loss_gap", below=1e-6, above=-1e-6, window=4)
    rollout = StagedRollout(two_stages(gate), baseline=recorded, dirpath=tmp_path)
    train(rollout, 12, blocks=2)
    assert stages_of(rollout, tmp_path) == {0: "high", 4: "low"}  # the same run up to there
    write_loss(tmp_path / "other", Loss.of(range(1, 13), [x * 0.9 for x in model.losses]))
    rollout = StagedRollout(two_stages(gate), baseline=tmp_path / "other", dirpath=tmp_path / "o")
    train(rollout, 8, blocks=2)
    (failed,) = [e for e in read_events(tmp_path / "o") if isinstance(e, GateResult)]
    assert failed.numbers["value"] == pytest.approx(1 / 9, rel=1e-5)


def test_tokens_are_counted_from_the_batch_or_given(tmp_path: Path) -> None:
    per_step = 4 * (CONTEXT + 1)
    for name, options, step in (
        ("counted", {}, 3),
        ("given", {"tokens_per_step": per_step // 2}, 5),
        ("accumulated", {}, 2),
    ):
        recipe = RolloutRecipe(
            name="tokens",
            stages=(
                Stage(name="high", layers=HIGH, until={"tokens": 2 * per_step + 1}),
                Stage(name="low", layers=LOW),
            ),
        )
        rollout = StagedRollout(recipe, dirpath=tmp_path / name, **options)
        accumulate = 2 if name == "accumulated" else 1
        train(rollout, 12, blocks=2, accumulate_grad_batches=accumulate)
        assert stages_of(rollout, tmp_path / name) == {0: "high", step: "low"}


# -- others who write to the table ----------------------------------------------------------------


class Demoted(L.Callback):
    """Stands for an incident: convicts a layer at a step, as an investigation would."""

    def __init__(self, fallback: PrecisionFallback, at: int) -> None:
        self.fallback, self.at = fallback, at

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        step, fallback = trainer.global_step, self.fallback
        if step == self.at:
            table = trainer.precision_plugin.precision_map
            before = {FC1: table.formats()[FC1]}
            table.set(FC1, "fp32", reason="incident")
            table.apply()
            supervisor = supervisor_of(fallback)
            told = supervisor.watch.fallback.convicted(supervisor.state.fallback, step, before)
            supervisor.state = dataclasses.replace(supervisor.state, fallback=told)


def test_a_demotion_holds_the_rollout_until_probation_ends(tmp_path: Path) -> None:
    fallback = PrecisionFallback(
        policy=FallbackPolicy(hold=8), limit=None, probe_every_n_steps=None
    )
    recipe = RolloutRecipe(
        name="three",
        stages=(
            Stage(name="ends", layers={"blocks[-1].fc2": "high"}, until={"steps": 6}),
            Stage(name="all", layers=LOW, until={"steps": 4}),
            Stage(name="high", layers=HIGH),
        ),
    )
    rollout = StagedRollout(recipe, dirpath=tmp_path)
    _, seen, _ = train(rollout, 30, Demoted(fallback, 4), fallback, blocks=2)
    # Four steps of the first stage are over when probation begins, and two are left after it.
    assert stages_of(rollout, tmp_path) == {0: "ends", 14: "all", 18: "high"}
    assert [s for s, f in seen.formats.items() if f[FC1] == "fp32"] == [
        *range(4, 12),
        *range(18, 30),
    ]
    notes = [e for e in read_events(tmp_path) if isinstance(e, Note) and "rollout" in e.reason]
    assert [note.step for note in notes] == [4, 12]
    assert "waits in stage ends: PrecisionFallback watches the layers" in notes[0].reason


def test_for_good_is_for_good(tmp_path: Path) -> None:
    fallback = PrecisionFallback(
        policy=FallbackPolicy(max_demotions=1), limit=None, probe_every_n_steps=None
    )
    rollout = StagedRollout(two_stages(steps=8), dirpath=tmp_path)
    train(rollout, 14, Demoted(fallback, 4), fallback, blocks=2)
    assert rollout.stage == "high"
    assert "for good" in rollout.state.ended


def test_what_others_have_set_is_left_alone(tmp_path: Path) -> None:
    class Climbs(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.precision_plugin.precision_map.set(FC1, "fp8-rowwise", reason="a limit")

    recipe = RolloutRecipe(
        name="a",
        stages=(
            Stage(name="dynamic", layers={"*": "fp8-dynamic"}, until={"steps": 4}),
            Stage(name="delayed", layers={"*": "fp8-delayed"}, until={"steps": 4}),
            Stage(name="high", layers=HIGH),
        ),
    )
    _, seen, _ = train(StagedRollout(recipe, dirpath=tmp_path), 12, Climbs(), blocks=2)
    assert [seen.formats[step][FC1] for step in (1, 3, 5, 9)] == [
        "fp8-dynamic",
        "fp8-rowwise",
        "fp8-rowwise",
        "fp32",  # high precision is safer than any rung
    ]
    delayed = [e for e in read_events(tmp_path) if isinstance(e, StageChange)][1]
    assert delayed.numbers["layers_left"] == 1
    assert delayed.action == "7 layers change, 1 layer stays as others have set it"


def test_delayed_scales_are_found_anew_at_each_entry(tmp_path: Path) -> None:
    gate = Gate(statistic="sqnr_db/min", above=500.0, window=3)
    recipe = RolloutRecipe(
        name="back",
        stages=(
            Stage(name="high", layers=HIGH, until={"steps": 2}),
            Stage(name="low", layers=LOW, gates=(gate,), on_fail="step_back"),
        ),
    )
    cold: dict[int, bool] = {}

    class Cold(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
            layer = module.get_submodule(FC1)
            if layer.format.scaling == "delayed":
                cold[trainer.global_step] = layer.kernel.cold
                if layer.kernel.cold:  # nothing of the time before
                    history = trainer.precision_plugin.precision_map.scale_history
                    index = history.names.index(FC1)
                    assert history._history[index].count_nonzero() == 0

    rollout = StagedRollout(recipe, dirpath=tmp_path)
    train(rollout, 12, ClampMonitor(every_n_steps=1), Cold(), scaling="delayed", blocks=2)
    assert cold == {2: True, 3: False, 4: False, 8: True, 9: False, 10: False}


# -- state ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "5.ckpt"
    rollout = StagedRollout(recipe_of("balanced"), dirpath=tmp_path)
    train(rollout, 8, *watching("balanced"), save_after={5: path})
    loaded = torch.load(path, weights_only=True)
    assert loaded["callbacks"]["StagedRollout"]["rollout"]["stage"] == "all-but-ends"


def test_a_recipe_changed_on_resume_takes_effect(tmp_path: Path) -> None:
    path = tmp_path / "6.ckpt"
    train(StagedRollout(two_stages(steps=4), dirpath=tmp_path), 8, save_after={6: path})
    changed = RolloutRecipe(
        name="changed",
        stages=(
            Stage(name="high", layers=HIGH, until={"steps": 4}),
            Stage(name="low", layers={"blocks[0]": "high", **LOW}, until={"steps": 4}),
            Stage(name="again", layers=HIGH),
        ),
    )
    rollout = StagedRollout(changed, dirpath=tmp_path)
    _, seen, trainer = train(rollout, 12, ckpt=path)
    _, low, high = follow(changed, trainer.precision_plugin)
    assert seen.formats[6] == low.formats
    assert seen.formats[8] == high.formats
    gone = StagedRollout(RolloutRecipe(name="x", stages=(Stage(name="y", layers=HIGH),)))
    with pytest.raises(ValueError, match="cannot go on from the checkpoint: stage must be one of"):
        train(gone, 12, ckpt=path)


# -- what is refused ------------------------------------------------------------------------------


def test_recipes_are_taken_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.get("balanced").to_yaml())
    for given in ("balanced", recipes.get("balanced"), path, str(path), path.read_text()):
        assert StagedRollout(given).recipe == recipes.get("balanced")
    with pytest.raises(ValueError, match="recipe must be one of conservative"):
        StagedRollout("unbalanced")


@pytest.mark.parametrize(
    ("gate", "callbacks", "message"),
    [
        ({"statistic": "sqnr_db/min"}, [], "needs ClampMonitor(); add it to Trainer(callbacks"),
        ({"statistic": "magnitude/mean"}, [], "needs ClampMonitor()"),
        ({"statistic": "parity/loss_gap"}, [], "needs ParityProbe(); add it"),
        ({"statistic": "fallbacks"}, [], "needs PrecisionFallback(); add it"),
        ({"statistic": "precision/eval_gap"}, [], "needs EvaluationGap(); add it"),
        ({"statistic": "mismatch/k3_kl"}, [], "needs MismatchMonitor(); add it"),
        (
            {"statistic": "what_if_delayed_clamped_mass/max"},
            [ClampMonitor()],
            "needs ClampMonitor(what_if=True), got ClampMonitor(what_if=False)",
        ),
        (
            {"statistic": "sqnr_db/min"},
            [ClampMonitor(log_every_n_steps=50)],
            "window must be at least 50, got 10: ClampMonitor logs once in 50 steps",
        ),
        (
            {"statistic": "parity/loss_gap"},
            [ParityProbe(every_n_steps=20)],
            "window must be at least 20, got 10: ParityProbe probes once in 20 steps",
        ),
        (
            {"statistic": "parity/los_gap"},
            [ParityProbe(every_n_steps=2)],
            "statistic must be one of parity/loss, parity/loss_gap",
        ),
    ],
)
def test_gates_that_nobody_can_answer(
    gate: dict[str, Any], callbacks: list[L.Callback], message: str
) -> None:
    rollout = StagedRollout(two_stages(Gate(below=1.0, window=10, **gate)))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train(rollout, 2, *callbacks)
    assert str(caught.value).startswith(f"stage 'high': gate {gate['statistic']!r}")


@pytest.mark.parametrize(
    ("gate", "stage", "callbacks", "why"),
    [
        ("sqnr_db/min", HIGH, [ClampMonitor()], "all layers are in high precision"),
        (
            "what_if_delayed_clamped_mass/max",
            {"*": "fp8-rowwise"},
            [ClampMonitor(what_if=True)],
            "no layer is in an FP8 format with one scale per tensor",
        ),
        ("scale_spread_bits/max", LOW, [ClampMonitor()], "every layer has one scale per tensor"),
        ("eval_gap", LOW, [EvaluationGap()], "the run has no validation"),
    ],
)
def test_gates_that_could_never_be_measured(
    gate: str, stage: dict[str, str], callbacks: list[L.Callback], why: str
) -> None:
    asked = Gate(statistic=gate, below=1.0, window=100)
    stages = (Stage(name="a", layers=stage, gates=(asked,)), Stage(name="b", layers={"*": "e8m3"}))
    rollout = StagedRollout(RolloutRecipe(name="never", stages=stages))
    with pytest.raises(ValueError, match=re.escape(f"stage 'a': gate {gate!r} can never be")) as e:
        train(rollout, 2, *callbacks)
    assert why in str(e.value)


def test_a_misspelled_statistic_is_no_metric_of_the_modules_in_silence(tmp_path: Path) -> None:
    gate = Gate(statistic="clampd_mass/max", below=1.0, window=3)
    rollout = StagedRollout(two_stages(gate), dirpath=tmp_path)
    meant = r"no callback measures 'clampd_mass/max'.*; did you mean 'clamped_mass/max'\?"
    with pytest.warns(UserWarning, match=meant):
        train(rollout, 1)


def test_stages_are_announced_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(StagedRollout(two_stages(steps=2), dirpath=tmp_path), 4, blocks=1)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert lines == [
        "step 0: stage high: the rollout begins; 4 layers change",
        "step 2: stage high -> low: the stage has lasted 2 steps (due at 2); 4 layers change",
    ]


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens_per_step must be at least 1, got 0"):
        StagedRollout("balanced", tokens_per_step=0)
    gap = two_stages(Gate(statistic="loss_gap", below=0.1))
    with pytest.raises(ValueError, match="stage 'high': gate 'loss_gap' needs a recorded run"):
        StagedRollout(gap)
    with pytest.raises(ValueError, match="no loss in"):
        train(StagedRollout(gap, baseline=tmp_path), 2)
    with pytest.raises(ValueError, match="StagedRollout needs a precision plugin of lightning_fp"):
        make_trainer(None, callbacks=[StagedRollout("bf16-cooldown")]).fit(LanguageModel())
    with pytest.raises(ValueError, match="has nothing to move: FP8Precision is configured"):
        train(StagedRollout("bf16-cooldown"), 2, layers={"*": "bf16"})
    typo = RolloutRecipe(name="a", stages=(Stage(name="b", layers={"*.fc3": "high"}),))
    with pytest.raises(ValueError, match=r"stage 'b': layers: pattern '\*.fc3' matches no linear"):
        train(StagedRollout(typo), 2)


def test_a_run_of_unknown_length_has_no_shares() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(batches(9))

    trainer = make_trainer(
        FP8Precision(base="32-true"),
        max_epochs=-1,
        callbacks=[StagedRollout("bf16-cooldown")],
    )
    with pytest.raises(ValueError, match=r"stage 'low': until.share needs a run of known length"):
        trainer.fit(LanguageModel(), torch.utils.data.DataLoader(Endless(), batch_size=None))


def test_batches_without_integers_have_no_tokens() -> None:
    class Floats(LanguageModel):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step(batch.long(), index)

    recipe = RolloutRecipe(
        name="a",
        stages=(
            Stage(name="high", layers=HIGH, until={"tokens": 5}),
            Stage(name="low", layers=LOW),
        ),
    )
    trainer = make_trainer(
        FP8Precision(base="32-true"), max_steps=2, callbacks=[StagedRollout(recipe)]
    )
    loader = torch.utils.data.DataLoader(text_rows(8).float(), batch_size=4)
    with pytest.raises(ValueError, match=r"give StagedRollout.*tokens_per_step="):
        trainer.fit(Floats(), loader)


def test_a_rollout_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no idea")

    rollout = StagedRollout(two_stages(), dirpath=tmp_path)
    monkeypatch.setattr(Rollout, "step", fail)
    with caplog.at_level(logging.ERROR, "lightning_fp"):
        model, _, _ = train(rollout, 4, blocks=2)
    assert len(model.losses) == 4
    assert caplog.text.count("StagedRollout failed; training continues") == 1
    (note,) = read_events(tmp_path)
    assert "the rollout has failed in stage None, the run goes on: no idea" in note.reason


def test_a_metric_that_stands_still_counts_as_often_as_it_is_logged(tmp_path: Path) -> None:
    class Constant(LanguageModel):
        def training_step(self, batch: Any, index: int) -> Any:
            self.log("constant", 0.5)
            return super().training_step(batch, index)

    rollout = StagedRollout(
        two_stages(Gate(statistic="constant", below=1.0, window=3)), dirpath=tmp_path
    )
    trainer = make_trainer(
        FP8Precision(base="32-true"), max_epochs=1, log_every_n_steps=1, callbacks=[rollout]
    )
    trainer.fit(Constant(), batches(8))
    assert stages_of(rollout, tmp_path) == {0: "high", 4: "low"}
