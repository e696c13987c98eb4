"""The example for LightningCLI: its YAML runs, prints itself and comes back, refuses clearly."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_fp.records import read_evaluation, read_run, read_steps

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_cli"
CONFIG = str(EXAMPLE / "config.yaml")
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.layers=3",
    "--model.width=32",
    "--data.context=16",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    # Lightning still calls this method of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., LightningCLI]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    main = runpy.run_path(str(EXAMPLE / "main.py"))["main"]
    return lambda *args: main(list(args))


def test_it_runs(run: Callable[..., LightningCLI], tmp_path: Path) -> None:
    edits = ["--trainer.max_steps=8", "--trainer.val_check_interval=4", "--data.batch_size=4"]
    cli = run("fit", "--config", CONFIG, *QUIET, *edits)
    plugin = cli.trainer.precision_plugin
    assert plugin.settings()["delayed"]["history_len"] == 16
    assert plugin.settings()["layers"]["*.mlp.down"] == "fp8-delayed[grad_output=e4m3]"
    assert plugin.settings()["layers"]["*.attention.out"] == "fp8-dynamic"
    directory = tmp_path / "runs/lightning_cli"
    assert read_steps(directory)["step"].to_pylist() == list(range(1, 9))
    assert read_evaluation(directory)["step"].to_pylist() == [4, 8]
    (info,) = read_run(directory)
    assert info.settings["PrecisionFallback"]["limit"]["clamped_mass"] == 0.02
    assert info.settings["PrecisionFallback"]["detector"]["armed"] == 64
    assert info.settings["StagedRollout"]["recipe"]["name"] == "balanced"


def printed(run: Callable[..., Any], capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit:
        run("fit", *args, "--print_config")
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_print_config_comes_back(
    run: Callable[..., LightningCLI], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = printed(run, capsys, "--config", CONFIG, *QUIET)
    (tmp_path / "all.yaml").write_text(first)
    assert printed(run, capsys, "--config", "all.yaml") == first
    options = yaml.safe_load(first)["trainer"]
    fallback = options["callbacks"][1]["init_args"]
    assert fallback["limit"]["clamped_mass"] == 0.02
    assert fallback["limit"]["patience"] == 3  # its default, for the reader
    assert options["plugins"][0]["init_args"]["base"] == "bf16-mixed"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("trainer.plugins.0.init_args.base=bf17", "base"),
        ("trainer.plugins.0.init_args.scaling=fp9", "scaling: format must be one of"),
        ("trainer.plugins.0.init_args.layers={'head': fp9}", r"layers\['head'\]: format must be"),
        ("trainer.plugins.0.init_args.colour=red", "colour"),
        ("trainer.callbacks.0.init_args.every_n_steps=0", "every_n_steps must be at least 1"),
        ("trainer.callbacks.0.init_args.every_n_steps=often", "every_n_steps"),
        ("trainer.callbacks.1.init_args.limit.clamped_mass=-1", "clamped_mass must be None or"),
        ("trainer.callbacks.1.init_args.detector.armed=-1", "armed must be"),
        ("trainer.callbacks.1.init_args.policy.grace=x", "grace"),
        ("trainer.callbacks.2.init_args.recipe=bold", "bold"),
        ("trainer.callbacks.3.init_args.batches=0", "batches must be at least 1, got 0"),
    ],
)
def test_an_error_names_the_field(
    run: Callable[..., LightningCLI],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    edit: str,
    message: str,
) -> None:
    config: Any = yaml.safe_load(Path(CONFIG).read_text())
    path, _, value = edit.partition("=")
    *parents, last = path.split(".")
    where = config
    for key in parents:
        where = where[int(key)] if isinstance(where, list) else where[key]
    where[last] = yaml.safe_load(value)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises((SystemExit, ValueError)) as raised:
        run("fit", "--config", "wrong.yaml", *QUIET)
    error = capsys.readouterr().err
    said = f"{raised.value}\n{error}"
    assert raised.value.args != (0,)
    assert re.search(message, said), said
    *_, last = error.splitlines()  # the field, and no usage or Python type around it
    assert error.count("\nerror: ") + error.startswith("error: ") == 1
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert not re.search("usage:|<class|Literal|Subtypes", error)
