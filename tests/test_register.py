"""Trainer(precision="fp8-...") by one explicit, reversible patch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import lightning_fp.plugins.precision_names
from lightning_fp import FP8Precision
from tests.helper import make_trainer

ORIGINAL = _AcceleratorConnector.__init__


@pytest.fixture
def register() -> Iterator[ModuleType]:
    module = importlib.import_module("lightning_fp.register")
    module.register()
    yield module
    module.undo()
    assert _AcceleratorConnector.__init__ is ORIGINAL
    del sys.modules[module.__name__]  # the next import registers again


@pytest.mark.parametrize(
    "name", ["fp8-dynamic", "rowwise", "fp8-rowwise-gw-hp", "fp8-auto", "mx", "e8m3"]
)
def test_names_reach_the_trainer(register: ModuleType, name: str) -> None:
    plugin = make_trainer(None, precision=name).precision_plugin
    assert isinstance(plugin, FP8Precision)
    assert plugin.precision == "bf16-mixed"


def test_lightnings_own_names_pass_unchanged(register: ModuleType) -> None:
    assert type(make_trainer(None).precision_plugin) is Precision
    assert type(make_trainer(None, precision="32-true").precision_plugin) is Precision
    assert type(make_trainer(None, precision="bf16-mixed").precision_plugin) is MixedPrecision
    with pytest.raises(ValueError, match="Precision 'fp9' is invalid"):
        make_trainer(None, precision="fp9")


def test_other_plugins_are_kept(register: ModuleType) -> None:
    from lightning.pytorch.plugins.environments import LightningEnvironment

    environment = LightningEnvironment()
    for plugins in (environment, [environment]):
        trainer = make_trainer(None, precision="fp8-dynamic", plugins=plugins)
        assert isinstance(trainer.precision_plugin, FP8Precision)


def test_a_call_says_the_same_and_no_linter_removes_it() -> None:
    assert _AcceleratorConnector.__init__ is ORIGINAL  # the name alone does nothing
    lightning_fp.enable_precision_names()
    try:
        trainer = make_trainer(None, precision="delayed")
        assert isinstance(trainer.precision_plugin, FP8Precision)
        for misspelled, meant in (("fp8", "fp8-dynamic"), ("delayd", "delayed")):
            with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
                make_trainer(None, precision=misspelled)
        with pytest.raises(ValueError, match="Precision 'high' is invalid"):
            make_trainer(None, precision="high")
    finally:
        lightning_fp.plugins.precision_names.undo()
    assert _AcceleratorConnector.__init__ is ORIGINAL


def test_unknown_formats_are_refused_in_our_words(register: ModuleType) -> None:
    with pytest.raises(ValueError, match="scaling: format must be one of"):
        make_trainer(None, precision="fp8-statc")


def test_two_precision_plugins_are_refused(register: ModuleType) -> None:
    with pytest.raises(L.fabric.utilities.exceptions.MisconfigurationException, match="Precision"):
        make_trainer(FP8Precision(), precision="fp8-dynamic")


def test_undo_restores_lightning(register: ModuleType) -> None:
    assert _AcceleratorConnector.__init__ is not ORIGINAL
    register.undo()
    register.undo()
    assert _AcceleratorConnector.__init__ is ORIGINAL
    with pytest.raises(ValueError, match="Precision 'fp8-dynamic' is invalid"):
        make_trainer(None, precision="fp8-dynamic")
    register.register()
    register.register()
    assert isinstance(make_trainer(None, precision="fp8-dynamic").precision_plugin, FP8Precision)


def test_an_unknown_lightning_is_refused(
    register: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    register.undo()

    def other(self: Any, devices: str = "auto") -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(_AcceleratorConnector, "__init__", other)
        with pytest.raises(RuntimeError, match=r"does not know lightning .*Trainer\(plugins="):
            register.register()
