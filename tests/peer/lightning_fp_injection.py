"""A plugin of pytest: every Trainer that names no precision gets one of our plugins.

It is loaded into a test-suite that knows nothing of this package, by `-p lightning_fp_injection`
with this directory on the path. The environment says what is given and where results go:

- `PEER_FORMAT`: the format of the plugin, empty for a run of plain Lightning.
- `PEER_FALLBACK`: "1" if every such Trainer gets a `PrecisionFallback` as well.
- `PEER_RESULTS`: a file to which a line of JSON is added as each test starts and as it ends.
- `PEER_ONLY`: a file with the tests to run, one a line; empty for all.

Only the names in the Trainer's own module are replaced, so that a test which makes one of its
connectors by hand has Lightning's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch.trainer.trainer as trainer_module
import pytest
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

FORMAT = os.environ.get("PEER_FORMAT", "")
FALLBACK = os.environ.get("PEER_FALLBACK", "") == "1"
RESULTS = Path(os.environ["PEER_RESULTS"])
ONLY = os.environ.get("PEER_ONLY", "")
OWN_PRECISION = ("fsdp", "deepspeed", "xla", "tpu")
"""Strategies and accelerators that take no plugin but their own; this package refuses them by name.
"""

trainers = 0
"""How many Trainers without a precision the running test has made."""


class Connector(_AcceleratorConnector):
    """Adds our plugin where a Trainer names no precision."""

    def __init__(self, **options: Any) -> None:
        global trainers
        self.ours = names_no_precision(options)
        if self.ours:
            trainers += 1
            if FORMAT:
                options["plugins"] = [*as_list(options.get("plugins")), precision(FORMAT)]
        super().__init__(**options)


class Callbacks(_CallbackConnector):
    """Adds the fallback where the plugin was added."""

    def on_trainer_init(self, callbacks: Any, *args: Any, **options: Any) -> None:
        if FALLBACK and self.trainer._accelerator_connector.ours:
            from lightning_fp import PrecisionFallback

            callbacks = [*as_list(callbacks), PrecisionFallback()]
        super().on_trainer_init(callbacks, *args, **options)


trainer_module._AcceleratorConnector = Connector  # type: ignore[misc]
trainer_module._CallbackConnector = Callbacks  # type: ignore[misc]


def precision(format: Any) -> Precision:
    """All linear layers in a format, as small as those of Lightning's test models are.

    Without such a layer the plugin alone is tried: by default that is refused, and a rule for "*"
    takes in what the defaults leave in high precision.
    """
    from lightning_fp import FP8Precision

    plugin = FP8Precision(format, base="32-true", layers={"*": format})
    plugin.configured = dataclasses.replace(plugin.configured, empty=True)
    return plugin


def names_no_precision(options: dict[str, Any]) -> bool:
    """Whether a Trainer leaves the precision to Lightning's default."""
    strategy = options.get("strategy")
    chosen = strategy, options.get("accelerator")
    names = [each if isinstance(each, str) else type(each).__name__ for each in chosen]
    own = any(part in name.lower() for name in names for part in OWN_PRECISION)
    given = [*as_list(options.get("plugins")), getattr(strategy, "_precision_plugin", None)]
    named = any(isinstance(plugin, Precision) for plugin in given)
    return options.get("precision") is None and not named and not own


def as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def tell(**line: Any) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of a plugin that runs failed tests again")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ONLY:
        wanted = set(Path(ONLY).read_text().splitlines())
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """One line as a test starts, which stays the last one if the process dies in it."""
    global trainers
    trainers = 0
    item.stash[started] = time.monotonic()
    tell(test=item.nodeid, outcome="started")
    return (yield)


started = pytest.StashKey[float]()
worst = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """One line as it ends: that of the first of its three phases that did not pass."""
    report: pytest.TestReport = yield
    before = item.stash.get(worst, None)
    if before is None or (before.passed and not report.passed):
        item.stash[worst] = report
    if report.when == "teardown":
        shown = item.stash[worst]
        tell(
            test=item.nodeid,
            outcome="xfailed" if hasattr(shown, "wasxfail") else shown.outcome,
            trainers=trainers,
            seconds=round(time.monotonic() - item.stash[started], 2),
            message="" if shown.passed else last_words(shown),
        )
    return report


def last_words(report: pytest.TestReport) -> str:
    """The message of an exception, or of a skip."""
    crash = getattr(report.longrepr, "reprcrash", None)
    words = crash.message if crash is not None else str(report.longrepr)
    return words[:1000]
