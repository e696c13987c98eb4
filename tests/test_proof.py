"""What `benchmarks/rescue.py` measures is what it says: precision's faults, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from benchmarks.proof import arms
from benchmarks.proof.activation_bound import ActivationBound
from benchmarks.proof.cases import CASES, OTHER, PRECISION
from benchmarks.proof.faults import Growing
from benchmarks.proof.innocents import first_time
from benchmarks.proof.journal import measure, measured
from benchmarks.proof.nets import Batches
from benchmarks.proof.pairs import healthy_run
from benchmarks.proof.plain import runs_plainly
from benchmarks.proof.table import rate, summary, wilson
from benchmarks.proof.tries import attempt
from lightning_fp import FP8Precision
from tests.helper import make_trainer

NEW = [name for name in PRECISION if not name.startswith("gpt ")]
FAULTY = [name for name in NEW if PRECISION[name].make() is not None]
INNOCENT = [name for name in OTHER if not name.startswith("gpt ")]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def losses(name: str, start: int, *, low: bool) -> list[float]:
    """Of 10 batches, with the fault at its full size from `start` on."""
    case, seen = PRECISION[name], Losses()
    fault = case.make()
    assert isinstance(fault, Growing)
    assert case.net is not None
    fault.start, fault.ramp = start, 1
    if hasattr(fault, "every"):
        fault.every = 1
    scaling = case.scaling
    plugin = FP8Precision(scaling, base="32-true", layers={"*": scaling}) if low else None
    trainer = make_trainer(plugin, max_epochs=1, callbacks=[fault, seen])
    net = case.net(0)
    batches = net.batches(10, 0)
    spoiled = Batches(batches, fault.spoil) if hasattr(fault, "spoil") else Batches(batches)
    trainer.fit(net, spoiled)
    return seen.losses


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_changes_nothing_in_high_precision_and_something_in_fp8(name: str) -> None:
    assert losses(name, 4, low=False) == losses(name, 10**6, low=False)
    faulty, healthy = losses(name, 4, low=True), losses(name, 10**6, low=True)
    assert faulty[:4] == healthy[:4]
    assert faulty[4:] != healthy[4:]


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("ERROR"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", NEW)
def test_a_fault_spoils_an_unprotected_run_and_the_fallback_saves_it(name: str) -> None:
    high = attempt(name, "high precision", 0)
    assert attempt(name, "unprotected", 0).gap(high) > 0.05
    saved = attempt(name, "fallback", 0)
    assert saved.changed
    assert saved.gap(high) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", INNOCENT)
def test_precision_is_not_blamed_for_what_is_not_its_fault(name: str) -> None:
    assert not attempt(name, "fallback", 0).changed


def test_of_one_moment_is_once() -> None:
    first = first_time()
    assert [first(3), first(3), first(4)] == [True, False, True]


def test_intervals_are_wilsons() -> None:
    low, high = wilson(9, 10)
    assert (low, high) == pytest.approx((0.596, 0.982), abs=1e-3)  # Newcombe 1998, by hand
    assert rate(0, 10) == "0/10 [0%, 28%]"


def test_a_run_counts_as_saved_up_to_one_percent() -> None:
    rows = [
        {"case": "x", "seed": seed, "final_loss": loss, "changed": {}, "first_change": when}
        | dict.fromkeys(("kept", "replayed", "rolled_back", "skipped"), 0)
        for seed, loss, when in [(0, 1.009, 104), (1, 1.02, None), (2, float("nan"), 110)]
    ]
    told = summary(rows, {("x", seed): 1.0 for seed in range(3)}, {"x": 100})
    assert (told["saved"], told["blamed"], told["delay"]) == (1, 2, 7)


def double(work: dict[str, Any]) -> dict[str, Any]:
    return {**work, "twice": 2 * work["number"]}


def test_what_the_journal_has_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"number": 1, "twice": -1}) + "\n")
    work = [{"number": number} for number in (1, 2, 2)]
    rows = measure(path, work, double, jobs=1, key=lambda row: (row["number"],))
    assert rows == [{"number": 1, "twice": -1}, {"number": 2, "twice": 4}] == measured(path)


def test_a_healthy_pair_is_acquitted_and_a_format_that_is_too_coarse_convicted() -> None:
    healthy = healthy_run("regressor", "fp8-dynamic", 1.0, 0, pairs=2, window=16)
    assert (healthy.pairs, healthy.convicted) == (2, [])
    assert sum(healthy.findings.values()) == 2
    coarse = healthy_run("vit", "e5m0", 1.0, 0, pairs=2, window=16)
    assert coarse.convicted


def test_in_a_plain_loop_there_are_the_cases_without_a_trainers_part() -> None:
    plain = {name for name, case in CASES.items() if runs_plainly(case)}
    assert {"aligned-pair", "one-in-20", "gpt stuck-scale", "vit healthy"} <= plain
    assert not plain & {"two-optimizers", "one noisy rank", "flipped bit"}


@pytest.mark.slow
def test_a_plain_loop_saves_what_the_trainer_saves() -> None:
    one, other = (attempt("one-in-20", "fallback", 0, loop=loop) for loop in ("trainer", "plain"))
    assert one.changed
    assert one.changed == other.changed
    assert one.first_change == other.first_change
    assert one.final_loss == other.final_loss


@pytest.mark.slow
def test_with_memory_for_fp8_alone_a_run_is_saved_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[ActivationBound] = []

    class Bound(ActivationBound):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bounds.append(self)

    monkeypatch.setattr(arms, "ActivationBound", Bound)
    one = attempt("one-in-20", "fallback", 0)
    other = attempt("one-in-20", "fallback, FP8 memory", 0)
    assert bounds[-1].seen.refused > 0
    assert one.changed == other.changed
    assert one.final_loss == pytest.approx(other.final_loss, rel=1e-3)
