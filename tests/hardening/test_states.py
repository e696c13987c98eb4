"""States in checkpoints: damaged, cut short, of an earlier release, of a later one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_fp import (
    ClampMonitor,
    EvaluationGap,
    FP8Precision,
    ParityProbe,
    PrecisionFallback,
    StagedRollout,
    state_version,
)
from lightning_fp.callbacks.run.run import Run
from lightning_fp.loop import PrecisionLoop
from lightning_fp.state_version import check_version, migration
from tests.helper import LanguageModel, make_trainer, text_loader

RELEASES = Path(__file__).parents[1] / "states"
QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def loop(directory: Path) -> PrecisionLoop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    return PrecisionLoop(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        "delayed",
        recipe="aggressive",
        fallback={"checkpoint_bytes": 0, "rehearse": False},
        parity=True,
        dirpath=directory,
        progress=False,
        max_steps=1000,
    )


def step(loop: PrecisionLoop) -> None:
    loop.step(lambda batch: loop.model(batch).square().mean(), torch.ones(4, 16))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    run = loop(tmp_path_factory.mktemp("saved"))
    for _ in range(3):
        step(run)
    state = run.state_dict()
    run.close()
    return state


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in it, as the keys on the way."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        parts = tree.items()
    elif isinstance(tree, list):
        parts = enumerate(tree)
    inside = [place for key, part in parts for place in places(part, (*path, key))]
    return [path, *inside] if path else inside


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**70, 1e400, "", "later", [], {}, [[]], torch.zeros(0), torch.ones(3, 3)]),
)


def damaged(tree: Mapping[str, Any], place: int, value: Any, drop: bool) -> dict[str, Any]:
    changed = copy.deepcopy(dict(tree))
    paths = places(changed)
    *way, last = paths[place % len(paths)]
    at: Any = changed
    for key in way:
        at = at[key]
    if drop:
        del at[last]
    else:
        at[last] = value
    return changed


def resumed(state: Mapping[str, Any], directory: Path) -> PrecisionLoop:
    """A loop that has loaded it, made a step and ended."""
    with loop(directory) as run:
        run.load_state_dict(state)
        step(run)
    return run


def go_on(state: Mapping[str, Any], directory: Path) -> None:
    try:
        resumed(state, directory)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said, said
        assert " state" in said, said


@settings(QUIET, max_examples=25)
@given(place=st.integers(0, 10**6), value=odd, drop=st.booleans())
def test_damaged_states(
    place: int, value: Any, drop: bool, saved: Mapping[str, Any], tmp_path: Path
) -> None:
    go_on(damaged(saved, place, value, drop), tmp_path)


@pytest.mark.slow
@settings(QUIET, max_examples=1000)
@given(place=st.integers(0, 10**6), value=odd, drop=st.booleans())
def test_a_thousand_damaged_states(
    place: int, value: Any, drop: bool, saved: Mapping[str, Any], tmp_path: Path
) -> None:
    go_on(damaged(saved, place, value, drop), tmp_path)


def version_places(state: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [path for path in places(state) if path[-1] == "version"]


def test_each_later_version_is_refused(saved: Mapping[str, Any], tmp_path: Path) -> None:
    """Of every state inside: the line says whose it is and what to do."""
    found = version_places(saved)
    assert len(found) >= 6
    for path in found:
        later = copy.deepcopy(dict(saved))
        at: Any = later
        for key in path[:-1]:
            at = at[key]
        at["version"] = 99
        with pytest.raises(ValueError, match=r"must have version 1, got 99; (resume|it is|start)"):
            resumed(later, tmp_path / "-".join(path))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_short(share: float, tmp_path: Path) -> None:
    """It ends as in plain Lightning, before a step was made."""
    path = tmp_path / "whole.ckpt"

    def fit(plugin: Any, **options: Any) -> L.Trainer:
        trainer = make_trainer(plugin, max_steps=2, default_root_dir=tmp_path)
        trainer.fit(LanguageModel(blocks=1), text_loader(16), **options)
        return trainer

    fit(FP8Precision()).save_checkpoint(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    kinds: list[type[Exception]] = []
    for plugin in (None, FP8Precision()):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - Lightning's own, whatever it is
            fit(plugin, ckpt_path=path)
        kinds.append(raised.type)
    assert kinds[0] is kinds[1]


CALLBACKS = (
    lambda directory: ClampMonitor(dirpath=directory),
    lambda directory: ParityProbe(dirpath=directory),
    lambda directory: PrecisionFallback(rehearse=False, dirpath=directory),
    lambda directory: StagedRollout("aggressive", dirpath=directory),
    lambda directory: EvaluationGap(dirpath=directory),
)


@pytest.mark.parametrize("make", CALLBACKS)
def test_callbacks_say_whose_state_is_damaged(make: Any, tmp_path: Path) -> None:
    for state in ({"version": 1}, {"version": "one"}, {"version": 2}, [3]):
        with pytest.raises(ValueError, match=r"state.*; (it is damaged|resume with)"):
            fit_from(make(tmp_path), state)


def fit_from(callback: L.Callback, state: Any) -> None:
    """Some of it is read only when the training begins."""
    callback.load_state_dict(state)
    trainer = make_trainer(FP8Precision(), max_steps=1, callbacks=[callback])
    trainer.fit(LanguageModel(blocks=1), text_loader(8))


@pytest.mark.parametrize("damage", [{"position": ""}, {"directory": False}, {"position": [3]}])
def test_where_it_was_written_is_damaged(damage: dict[str, Any], tmp_path: Path) -> None:
    with loop(tmp_path) as run:
        step(run)
        state = run.state_dict()
    state["records"] |= damage
    with loop(tmp_path) as run, pytest.raises(ValueError, match=r"state.*(position|directory) "):
        run.load_state_dict(state)
    ours = {"lightning_fp.run": damage, "lightning_fp.directories": damage}
    with pytest.raises(ValueError, match=r"the records' state: (positions|directories) must be"):
        Run().on_load_checkpoint(L.Trainer(logger=False), L.LightningModule(), ours)


# -- from release to release -----------------------------------------------------------------------


def test_states_of_every_release_are_read(tmp_path: Path) -> None:
    """tests/states/ has one of each; a release adds its own, and none is taken away."""
    releases = sorted(RELEASES.glob("*.pt"))
    assert releases
    for path in releases:
        state = torch.load(path, weights_only=True)
        run = resumed(state, tmp_path / path.stem)
        assert run.global_step == state["global_step"] + 1


def test_an_older_state_is_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_version, "_MIGRATIONS", {})

    @migration("a cat's state", since=1)
    def _(state: dict[str, Any]) -> dict[str, Any]:
        return {"lives": state["life"]}

    @migration("a cat's state", since=2)
    def _(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "name": ""}

    for of, state in (("v1", {"life": 9}), ("v2", {"lives": 9}), ("v3", {"lives": 9, "name": ""})):
        version = int(of[1])
        whole = {"version": version, **state}
        assert check_version(whole, 3, "a cat's state") == {"lives": 9, "name": ""}
        assert whole["version"] == version
    for version in (0, 4, None, True):
        with pytest.raises(ValueError, match=rf"a cat's state must have version 3, got {version};"):
            check_version({"version": version}, 3, "a cat's state")
    with pytest.raises(RuntimeError, match="two migrations"):
        migration("a cat's state", since=1)(dict)
