"""`lightning-fp recipes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_fp import recipes
from lightning_fp.cli import main
from lightning_fp.recipes import RolloutRecipe

GPT = "tests.helper:TinyGPT"


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["recipes", *args]) == 0
    return capsys.readouterr().out


def message(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is said about a mistake: one line on stderr, exit code 2."""
    assert main(["recipes", *args]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removeprefix("lightning-fp recipes: ").strip()


def test_list_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    listed = output(capsys, "list")
    for name in recipes.names():
        assert name in listed
    assert "high > all-but-ends > all" in listed


def test_show_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    for name in recipes.names():
        assert RolloutRecipe.from_yaml(output(capsys, "show", name)) == recipes.get(name)
    assert message(capsys, "show", "reckless").startswith("recipe must be one of conservative")


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(output(capsys, "schema")) == recipes.json_schema()


def test_check_says_what_a_recipe_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipes.get("balanced").to_yaml())
    said = output(capsys, "check", str(path))
    for part in ("blocks[-1]: high", "share 0.02", "sqnr_db/min above 15 over 100", "sound"):
        assert part in said
    assert json.loads(output(capsys, "check", "balanced", "--json"))["recipe"]["name"] == "balanced"


def test_check_with_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    said = output(capsys, "check", "balanced", "--model", GPT)
    assert "8 layers fp8-dynamic" in said
    assert "and 4 more" in said
    # two blocks are a first and a last one, with nothing between them: thirds take their place
    assert "Note: recipe 'balanced': the model has 2 numbered blocks, fewer than 4" in said
    options = ["--model", GPT, "--scaling", "delayed", "--json"]
    found = json.loads(output(capsys, "check", "balanced", *options))
    high, _, everything = found["course"]
    assert set(high["formats"].values()) == {"bf16"}
    assert len(everything["changes"]) == 4  # the two thirds at the ends
    assert list(everything["formats"].values()).count("fp8-delayed") == 8
    assert everything["low_precision_share"] > 0.5
    assert everything["formats"]["lm_head"] == "bf16"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps: 100", "steps: -100", "mine.yaml: stage 'all-but-ends': until.steps must be an in"),
        ("on_fail: step_back", "on_fail: back", "mine.yaml: stage 'all': on_fail must be one of"),
        ("blocks[0]", "blocks[a]", "mine.yaml: stage 'all-but-ends': layers: layer pattern must"),
        ("name: all-but-ends", "name: all", "mine.yaml: stage 'all': name must be another"),
        ("name: balanced", "name: [", "mine.yaml: line 3, column 7"),
    ],
)
def test_check_says_file_stage_and_field(
    old: str, new: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = recipes.get("balanced").to_yaml()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    assert said in message(capsys, "check", str(path))


def test_check_of_what_does_not_fit_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipes.get("balanced").to_yaml().replace("blocks[0]", "'*.ffn.*'"))
    said = message(capsys, "check", str(path), "--model", GPT)
    assert said.startswith(f"{path}: stage 'all-but-ends': layers: pattern '*.ffn.*' matches no")
    assert "no/such.yaml: cannot be read" in message(capsys, "check", "no/such.yaml")
    assert "cannot import" in message(capsys, "check", "balanced", "--model", "nowhere:factory")
