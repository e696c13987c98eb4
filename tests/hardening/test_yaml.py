"""Whatever a recipe's YAML or a configuration says: it is read, or one line says what is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_fp import RolloutRecipe, recipes
from lightning_fp.cli.config_errors import one_line

QUIET = settings(
    deadline=2000,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RIGHT = [recipes.get(name).to_yaml() for name in recipes.names()]

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.sampled_from([2**64, 10**400, 0.5, 1e-3, float("nan"), float("inf"), -1.0]),
    st.sampled_from(["high", "configured", "fp8-delayed", "hold", "step_back", "loss", "mean"]),
    st.text(max_size=4),
)
anything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "stages", "layers", "gates", "until", "steps", "*", "below"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = ("name", "description", "stages", "few_blocks", "evidence", "colour")
OF_A_STAGE = ("name", "layers", "until", "gates", "on_fail", "max_tries")


def read(text: str) -> None:
    try:
        recipe = RolloutRecipe.from_yaml(text)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 1500
    else:
        assert RolloutRecipe.from_yaml(recipe.to_yaml()) == recipe


@st.composite
def changed(draw: st.DrawFn) -> str:
    """A recipe that is right, with a few characters replaced."""
    text = draw(st.sampled_from(RIGHT))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        length = draw(st.integers(0, 8))
        mark = st.sampled_from([*"[]{}:-#&*!|>'\"%@`\t\n,? 0", "\0", "é", "<<: ", "!!python/"])
        text = text[:at] + draw(st.text(max_size=2) | mark) + text[at + length :]
    return text + "\n"  # not taken for a path


@st.composite
def built(draw: st.DrawFn) -> str:
    """A recipe's fields, with whatever in them."""
    right = {"name": "mine", "layers": {"*": "high"}}
    of_a_stage = st.dictionaries(st.sampled_from(OF_A_STAGE), anything)
    stages = draw(st.lists(of_a_stage.map(lambda own: {**right, **own}), max_size=2) | anything)
    fields = draw(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
    return yaml.safe_dump({"name": "r", "stages": stages, **fields}) + "\n"


texts = st.text(max_size=60).map(lambda text: text + "\n") | changed() | built()


@settings(QUIET, max_examples=60)
@given(texts)
def test_any_recipe(text: str) -> None:
    read(text)


@pytest.mark.slow
@settings(QUIET, max_examples=1000)
@given(texts)
def test_a_thousand_recipes(text: str) -> None:
    read(text)


BOMB = "[&a0 [x, x, x, x, x, x, x, x, x], {}]".format(
    ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
)
"""A line that stands for 10^11 texts."""


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "\n",
        "a: " * 5000 + "\n",
        f"{BOMB}\n",
        f"name: {BOMB}\nstages: []\n",
        f"name: b\nstages: {BOMB}\n",
        f"name: b\nstages: [{{name: c, layers: {BOMB}}}]\n",
        f"name: b\nstages: [{{name: c, layers: {{'*': {BOMB}}}}}]\n",
        f"name: b\nstages: [{{name: c, layers: {{'*': high}}, on_fail: {BOMB}}}]\n",
        f"name: b\nstages: [{{name: c, layers: {{'*': high}}, until: {{steps: {BOMB}}}}}]\n",
        f"name: b\nevidence: {BOMB}\nstages: [{{name: c, layers: {{'*': high}}}}]\n",
        "name: x\nstages: &s [*s]\n",
        f"name: {'x' * 1_000_000}!\nstages: []\n",
    ],
    ids=range(12),
)
@pytest.mark.timeout(20)
def test_small_texts_that_stand_for_large_ones(text: str) -> None:
    read(text)


CONFIG = Path(__file__).parents[2] / "examples" / "lightning_cli"


@given(st.text(st.sampled_from(list("abc -'\n:<>[]().\"1")), max_size=200))
@settings(QUIET, max_examples=60)
def test_any_complaint_about_a_configuration_is_one_line(message: str) -> None:
    line = one_line(message)
    assert "\n" not in line
    assert len(line) <= 405


def configure(change: Any, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration with one option of a plugin or a callback replaced."""
    index, name, value = change
    config = yaml.safe_load((CONFIG / "config.yaml").read_text())
    parts = [*config["trainer"]["plugins"], *config["trainer"]["callbacks"]]
    parts[index % len(parts)].setdefault("init_args", {})[name] = value
    config["trainer"] |= {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    config["trainer"]["default_root_dir"] = mkdtemp(dir=directory)  # each saves its configuration
    config["model"] = {"layers": 1, "width": 16}
    path = Path(mkdtemp(dir=directory)) / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    main = runpy.run_path(str(CONFIG / "main.py"))["main"]
    try:
        main(["fit", "--config", str(path), "--trainer.max_steps=0"])
    except SystemExit as end:
        code, said = end.code, capsys.readouterr().err
        assert code == 2
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
        assert "Traceback" not in said
    except ValueError as error:
        said = str(error)
        assert "\n" not in said
    capsys.readouterr()


CHANGES = st.tuples(
    st.integers(0, 6),
    st.sampled_from(
        ["scaling", "layers", "base", "every_n_steps", "dirpath", "limit", "policy", "recipe"]
    ),
    anything,
)


def ignoring(function: Any) -> Any:
    for message in (
        "ignore:LightningCLI's args parameter",
        "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
        "ignore:`Trainer.fit` stopped",
    ):
        function = pytest.mark.filterwarnings(message)(function)
    return function


@ignoring
@settings(QUIET, max_examples=4, deadline=None)
@given(change=CHANGES)
def test_any_configuration(
    change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    configure(change, tmp_path, capsys)


@pytest.mark.slow
@ignoring
@settings(QUIET, max_examples=300, deadline=None)
@given(change=CHANGES)
def test_hundreds_of_configurations(
    change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    configure(change, tmp_path, capsys)
