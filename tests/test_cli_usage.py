"""The command line before a command runs: help, mistakes, what is imported; and Ctrl-C."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_fp
from lightning_fp.cli import main
from lightning_fp.cli.interrupted import kept
from lightning_fp.cli.parser import Command, Commands
from lightning_fp.cli.signatures import COMMANDS


def all_commands(commands: Commands = COMMANDS) -> Iterator[tuple[list[str], Command]]:
    for name, command in commands.items():
        if isinstance(command, tuple):
            yield from (([name, *words], of) for words, of in all_commands(command[1]))
        else:
            yield [name], command


BY_NAME = {" ".join(words): command for words, command in all_commands()}


def ended(args: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(args)
    return end.value.code


@pytest.mark.parametrize("name", BY_NAME)
def test_help_has_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: lightning-fp {name} ")
    assert max(map(len, said.splitlines())) <= 80
    for parameter in inspect.signature(BY_NAME[name]).parameters.values():
        option = parameter.kind is parameter.KEYWORD_ONLY
        word = f"--{parameter.name.replace('_', '-')}" if option else parameter.name.upper()
        assert f"  {word} " in said or f"  {word}\n" in said
    # no type of Python's, no name of the package's inside
    assert not any(word in said for word in ("str", "<class", "None", "Literal", "tuple"))


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["--help"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert all(f"    {name} " in said for name in COMMANDS)
    assert ended(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-fp {lightning_fp.__version__}\n"


@pytest.mark.parametrize(
    ("line", "usage", "said"),
    [
        ("", "COMMAND ...", "COMMAND is missing: one of doctor, plan, recipes, "),
        ("doctr", "COMMAND ...", "there is no command 'doctr'; did you mean doctor?"),
        ("xyz", "COMMAND ...", "there is no command 'xyz'; there are doctor, plan, "),
        ("--versio", "COMMAND ...", "there is no option --versio; did you mean --version?"),
        ("plan", "plan FACTORY [options]", "FACTORY is missing"),
        ("plan a b", "plan FACTORY [options]", "does not know what to do with 'b'; see "),
        ("plan a --al", "plan FACTORY [options]", "there is no option --al; did you mean --all?"),
        ("plan --josn", "plan FACTORY [options]", "there is no option --josn; did you mean"),
        ("plan a --layers", "plan FACTORY [options]", "--layers needs a value"),
        ("doctor --json=yes", "doctor [options]", "--json takes no value, got 'yes'"),
        ("demo --steps many", "demo [options]", "--steps must be a whole number, got 'many'"),
        ("demo --steps 1e3", "demo [options]", "--steps must be a whole number, got '1e3'"),
        ("demo --rollout perhaps", "demo [options]", "--rollout must be true or false, got "),
        ("baseline a --precision bf16-mix", "baseline FACTORY [options]", "--precision must be one"
         " of bf16-mixed, bf16-true, 32-true, got 'bf16-mix'; did you mean bf16-mixed?"),
        ("recipes", "recipes COMMAND ...", "COMMAND is missing: one of list, show, check, schema"),
        ("recipes chek", "recipes COMMAND ...", "there is no command 'chek'; did you mean check?"),
        ("recipes check", "recipes check FILE [options]", "FILE is missing"),
        ("report", "report RUNS ... [options]", "RUNS is missing"),
        ("stats", "stats RUN [options]", "RUN is missing"),
        ("study clamp --threshold x", "study clamp [RUN] [options]", "must be a number, got"),
        ("study clamp --correction maxi", "study clamp [RUN] [options]", "did you mean max?"),
        ("completion fish", "completion SHELL [options]", "SHELL must be one of bash, zsh, tcsh"),
    ],
)  # fmt: skip
def test_mistakes_in_plain_words(
    line: str, usage: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(line.split()) == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first == f"usage: lightning-fp {usage}"
    command = usage.partition(" [")[0]
    words = [word for word in command.split() if word.islower()]
    assert second.startswith(f"{' '.join(['lightning-fp', *words])}: ")
    assert said in second
    assert not any(word in second for word in ("<class", "Literal", "argument", "key", "type"))
    assert captured.out == ""


LIGHT = """
import sys
from lightning_fp.cli import main

for line in ("--help", "--version", "plan --help", "recipes list", "recipes list --json", "plan",
             "study clamp --threshold x", "nope"):
    try:
        main(line.split())
    except SystemExit:
        pass
heavy = ("torch", "numpy", "lightning", "pyarrow", "jsonargparse", "torchmetrics")
print("loaded:", [name for name in heavy if name in sys.modules])
"""


def test_help_and_mistakes_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


# -- completion -----------------------------------------------------------------------------------


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    assert "--cuda-fp8" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_completion_without_shtab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)  # as if not installed
    assert main(["completion", "zsh"]) == 2
    assert 'pip install "lightning-fp[completion]"' in capsys.readouterr().err


# -- Ctrl-C ---------------------------------------------------------------------------------------

STOPPED = """
import lightning as L
import torch
from torch.utils.data import DataLoader

def while_building():
    raise KeyboardInterrupt

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

def while_training():
    return Module(), DataLoader(torch.ones(40, 4))
"""


@pytest.fixture
def factories(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "stopped.py"
    path.write_text(STOPPED)
    handler = signal.getsignal(signal.SIGINT)
    yield str(path)
    signal.signal(signal.SIGINT, handler)  # Lightning turns it off


def test_ctrl_c_before_anything_is_written(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{factories}:while_building"]) == 130
    assert capsys.readouterr().err == "\nlightning-fp plan: stopped; nothing was written\n"


def test_ctrl_c_says_what_is_kept(
    factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["baseline", f"{factories}:while_training", "--output", str(output)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    begin = f"lightning-fp baseline: stopped; kept in {tmp_path}: run/"
    assert last.startswith(begin)
    assert "loss.csv" in last
    assert len((output / "loss.csv").read_text().splitlines()) == 1 + 3


def test_what_is_kept(tmp_path: Path) -> None:
    assert kept({"json": True}, 0.0) == "nothing was written"
    run = tmp_path / "run"
    assert kept({"output": str(run)}, 0.0) == f"nothing was written to {run}"
    run.mkdir()
    for i in range(8):
        (run / f"{i}.csv").write_text("")
    said = kept({"output": str(run)}, 0.0)
    assert said.startswith(f"kept in {tmp_path}: run/0.csv, run/1.csv")
    assert said.endswith("run/5.csv and 2 more")
    assert kept({"output": str(run)}, 1e12) == f"nothing was written to {run}"
    assert kept({"output": str(run / "0.csv")}, 0.0) == f"kept in {run}: 0.csv"
