"""Recipes: what contradicts itself is refused by name, and YAML comes back equal."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp import recipes
from lightning_fp.layers import LinearFormat
from lightning_fp.recipes import Gate, RolloutRecipe, Stage, json_schema

HIGH = {"*": "high"}
LOW = {"*": "configured"}


def stage(name: str = "a", **options: Any) -> Stage:
    return Stage(**{"name": name, "layers": HIGH, **options})


def recipe(*stages: Stage) -> RolloutRecipe:
    return RolloutRecipe(name="test", stages=stages)


def gate(**options: Any) -> Gate:
    return Gate(**{"statistic": "clamped_mass/max", "below": 0.01, **options})


# -- construction ---------------------------------------------------------------------------------

WRONG_GATES: list[tuple[dict[str, Any], str]] = [
    ({"below": None}, "gate 'clamped_mass/max': below or above must be given, got neither"),
    ({"above": 0.01}, "gate 'clamped_mass/max': below must be more than above"),
    ({"below": "1"}, "gate 'clamped_mass/max': below must be a finite number, got '1'"),
    ({"below": True}, "below must be a finite number, got True"),
    ({"below": float("nan")}, "below must be a finite number, got nan"),
    ({"window": 0}, "gate 'clamped_mass/max': window must be an integer of at least 1, got 0"),
    ({"window": 2.5}, "window must be an integer of at least 1, got 2.5"),
    ({"reduce": "median"}, "reduce must be one of worst, max, min, mean, last, sum"),
    ({"statistic": ""}, "gate: statistic must be a name"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_GATES)
def test_wrong_gates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gate(**options)


WRONG_STAGES: list[tuple[dict[str, Any], str]] = [
    ({"name": " "}, "stage: name must be a text"),
    ({"layers": {}}, "stage 'a': layers must have at least one pattern"),
    ({"layers": ["*"]}, "stage 'a': layers must be a mapping"),
    ({"layers": {"*": "fp9"}}, "stage 'a': layers['*']: format must be one of"),
    ({"layers": {"*": "fp8-auto"}}, "stage 'a': layers['*']: format 'fp8-auto' cannot be used"),
    ({"layers": {"*": 8}}, "stage 'a': layers['*']: format must be a name, got 8"),
    ({"layers": {"*": "high", "x": "high"}}, "stage 'a': layers: pattern 'x' never applies"),
    ({"layers": {"blocks[": "high"}}, "stage 'a': layers: layer pattern must be"),
    ({"until": 5}, "stage 'a': until must be a mapping of steps, tokens, share, loss"),
    ({"until": {"epochs": 5}}, "stage 'a': until.epochs is not known"),
    ({"until": {"steps": -5}}, "stage 'a': until.steps must be an integer of at least 1, got -5"),
    ({"until": {"tokens": 1e9}}, "stage 'a': until.tokens must be an integer"),
    ({"until": {"share": 0}}, "stage 'a': until.share must be above 0 and at most 1, got 0"),
    ({"until": {"share": 1.5}}, "stage 'a': until.share must be above 0 and at most 1"),
    ({"until": {"loss": "low"}}, "stage 'a': until.loss must be a finite number"),
    ({"gates": "x"}, "stage 'a': gates must be a list"),
    ({"gates": ["x"]}, "stage 'a': gates must be Gates"),
    ({"gates": (gate(), gate())}, "stage 'a': gates: gate 'clamped_mass/max' is given twice"),
    ({"on_fail": "wait"}, "stage 'a': on_fail must be one of hold, step_back, stop, got 'wait'"),
    ({"on_fail": "stop"}, "stage 'a': on_fail must be 'hold' without gates"),
    ({"max_tries": 0}, "stage 'a': max_tries must be an integer of at least 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_STAGES)
def test_wrong_stages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stage(**options)


def ending(name: str, **until: Any) -> Stage:
    return stage(name, until=until)


WRONG_RECIPES: list[tuple[list[Stage], str]] = [
    ([], "stages must be a list of at least one stage"),
    ([ending("a", steps=1), stage("a")], "stage 'a': name must be another than that of stages[0]"),
    ([stage("a"), stage("b")], "stage 'b' is never reached: stage 'a' before it has neither"),
    (
        [ending("a", share=0.5), ending("b", share=0.5), stage("c")],
        "stage 'b': until.share must be more than 0.5 of stage 'a', got 0.5",
    ),
    (
        [ending("a", tokens=9), ending("b", steps=3), ending("c", tokens=8)],
        "stage 'c': until.tokens must be more than 9 of stage 'a', got 8",
    ),
    ([ending("a", share=1), stage("b")], "stage 'b' is never reached: stage 'a' lasts to the end"),
    (
        [stage("a", gates=(gate(),), on_fail="step_back"), stage("b")],
        "stage 'a': on_fail must be 'hold' or 'stop', got 'step_back'; no stage is before it",
    ),
    (
        [ending("a", steps=1), stage("b", gates=(gate(),))],
        "stage 'b': on_fail must be 'step_back', got 'hold': no stage comes after",
    ),
    ([stage("a", gates=(gate(),))], "stage 'a': gates must be empty, got 1: no other stage"),
]


@pytest.mark.parametrize(("stages", "message"), WRONG_RECIPES)
def test_contradictions(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(*stages)


def test_a_name_is_a_word() -> None:
    with pytest.raises(ValueError, match="name must be made of letters"):
        RolloutRecipe(name="my recipe", stages=(stage(),))


def test_a_format_may_be_given_as_a_record() -> None:
    format = LinearFormat("dynamic", "tensor", grad_output="e4m3")
    assert stage(layers={"*": format}).layers == {"*": "fp8-dynamic[grad_output=e4m3]"}


def test_recipes_can_be_copied_and_sent() -> None:
    balanced = recipes.get("balanced")
    assert pickle.loads(pickle.dumps(balanced)) == copy.deepcopy(balanced) == balanced


# -- built in -------------------------------------------------------------------------------------


def test_built_in_recipes_have_the_names_they_say() -> None:
    for name in recipes.names():
        assert recipes.get(name).name == name
        assert "Why so:" in (recipes.builtin.RECIPES[name].__doc__ or "")


def test_options() -> None:
    assert recipes.get("balanced", window=7).stages[1].until == {"steps": 7}
    assert len(recipes.get("delayed-after-dynamic", token_limit=None).stages) == 2
    with pytest.raises(ValueError, match="recipe must be one of conservative, balanced"):
        recipes.get("reckless")
    with pytest.raises(ValueError, match="'balanced' has no option 'wndow'; it has warmup, window"):
        recipes.get("balanced", wndow=3)


# -- YAML -----------------------------------------------------------------------------------------

number = st.floats(-1e30, 1e30) | st.integers(-(2**60), 2**60)
text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=12)
words = text.filter(lambda word: word.strip())


@st.composite
def any_gate(draw: Any) -> Gate:
    bounds = sorted(draw(st.lists(number, min_size=2, max_size=2, unique_by=float)))
    kept = draw(st.sampled_from(["both", "below", "above"]))
    return Gate(
        statistic=draw(words),
        below=None if kept == "above" else bounds[1],
        above=None if kept == "below" else bounds[0],
        window=draw(st.integers(1, 10**6)),
        reduce=draw(st.sampled_from(["worst", "max", "min", "mean", "last", "sum"])),
    )


patterns = st.sampled_from(["blocks[0]", "blocks[1:-1].mlp.*", "re:.*[.]3[.].*", "no", "1", "*"])
formats = st.sampled_from(["high", "configured", "fp8-delayed", "e8m3", "fp8-dynamic"])


def layers_of(pairs: list[tuple[str, str]]) -> dict[str, str]:
    layers = dict(pairs)
    star = layers.pop("*", None)
    return layers if star is None else {**layers, "*": star}


@st.composite
def any_recipe(draw: Any) -> RolloutRecipe:
    names = draw(st.lists(words, min_size=1, max_size=4, unique=True))
    stages: list[Stage] = []
    share = 0.0
    for i, name in enumerate(names):
        last = i + 1 == len(names)
        until: Any = {} if last else {"steps": draw(st.integers(1, 10**9))}
        if not last and draw(st.booleans()):
            share += draw(st.floats(0.001, 0.2))
            until = {"share": share, "loss": draw(number)}
        gates = draw(st.lists(any_gate(), max_size=2, unique=True)) if i else []
        on_fail = "step_back" if last else draw(st.sampled_from(["hold", "step_back", "stop"]))
        stages.append(
            Stage(
                name=name,
                layers=layers_of(draw(st.lists(st.tuples(patterns, formats), min_size=1))),
                until=until,
                gates=tuple(gates),
                on_fail=on_fail if gates else "hold",
                max_tries=draw(st.integers(1, 9)),
            )
        )
    return RolloutRecipe(name="any-1.0", description=draw(st.just("") | text), stages=stages)


@given(any_recipe())
def test_yaml_comes_back_equal(given: RolloutRecipe) -> None:
    text = given.to_yaml()
    back = RolloutRecipe.from_yaml(text)
    assert back == given
    assert back.to_yaml() == text
    for one, other in zip(back.stages, given.stages, strict=True):
        assert list(one.layers.items()) == list(other.layers.items())  # the order matters


@pytest.mark.parametrize("name", recipes.names())
def test_built_in_recipes_come_back_equal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.get(name).to_yaml())
    assert RolloutRecipe.from_yaml(path) == RolloutRecipe.from_yaml(str(path)) == recipes.get(name)


def test_numbers_are_read_as_people_write_them() -> None:
    text = "name: a\nstages:\n  - {name: b, layers: {'*': high}, until: {loss: 1e-3, steps: 5}}"
    assert RolloutRecipe.from_yaml(text).stages[0].until == {"loss": 1e-3, "steps": 5}


TEXT = """\
name: mine
stages:
  - name: first
    layers: {"*": high}
    until: {steps: 10}
    gates:
      - {statistic: clamped_mass/max, below: 0.01, window: 20}
  - name: second
    layers: {"blocks[0]": high, "*": configured}
"""

MUTATIONS: list[tuple[str, str, str]] = [
    # what is replaced, by what, what the message names
    ("name: mine", "name: 3", "name must be made of letters"),
    ("name: mine", "name: [a]", "name must be made of letters"),
    ("name: mine\n", "", "the recipe: name is missing"),
    ("name: mine", "nme: mine", "there is no field 'nme'; did you mean 'name'?"),
    ("name: mine", "name: mine\nname: again", "line 2, column 1: 'name' is given twice"),
    ("name: mine", "name: mine\nversion: 1", "there is no field 'version'"),
    ("name: mine", "name: my recipe", "name must be made of letters"),
    ("name: mine", "name: mine\ndescription: 7", "description must be a text, got 7"),
    ("stages:", "stages: 5\nother:", "there is no field 'other'"),
    (TEXT[11:], "stages: 5\n", "stages must be a list, got 5"),
    (TEXT[11:], "stages: []\n", "stages must be a list of at least one stage"),
    (TEXT[11:], "", "stages is missing"),
    (TEXT, "", "the recipe must be a mapping"),
    (TEXT, "- a\n- b\n", "the recipe must be a mapping"),
    (TEXT, "name: [a\n", "line 2, column 1"),
    (TEXT, "name: a\n  b: c\n", "line 2, column 4"),
    (TEXT, "name: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    (TEXT, "a: &x [*x, *x]\nstages: *x\n", "there is no field"),
    ("name: first", "name: second", "stage 'second': name must be another"),
    ("name: first", "name: 1", "stages[0]: stage: name must be a text, got 1"),
    ("name: first", "name: on", "stages[0]: stage: name must be a text, got True"),
    ("name: first", "title: first", "stages[0]: there is no field 'title'"),
    ('    layers: {"*": high}\n', "", "stage 'first': layers is missing"),
    ('{"*": high}', "{}", "stage 'first': layers must have at least one pattern"),
    ('{"*": high}', "high", "stage 'first': layers must be a mapping"),
    ('{"*": high}', "{*: high}", "put patterns that begin with '*' in quotes"),
    ('{"*": high}', '{"*": hgh}', "stage 'first': layers['*']: format must be one of"),
    ('{"*": high}', '{"*": 16}', "stage 'first': layers['*']: format must be a name, got 16"),
    ('{"*": high}', '{"*": fp8-auto}', "stage 'first': layers['*']: format 'fp8-auto' cannot be"),
    ('{"*": high}', '{"*": [high]}', "stage 'first': layers['*']: format must be a name"),
    ('{"*": high}', '{"re:[": high}', "stage 'first': layers: layer pattern must be a regular"),
    ('{"*": high}', "{1: high}", "stage 'first': layers: layer pattern must be a text"),
    ('{"*": high}', '{"*": high, "*": bf16}', "line 4, column 25: '*' is given twice"),
    ('{"*": high}', '{"*": high, "a": bf16}', "stage 'first': layers: pattern 'a' never applies"),
    ("{steps: 10}", "{steps: -10}", "stage 'first': until.steps must be an integer of at least 1"),
    ("{steps: 10}", "{steps: 10.5}", "stage 'first': until.steps must be an integer"),
    ("{steps: 10}", "{steps: ten}", "stage 'first': until.steps must be an integer"),
    ("{steps: 10}", "{steps: null}", "stage 'first': until.steps must be an integer"),
    ("{steps: 10}", "{stpes: 10}", "stage 'first': until.stpes is not known"),
    ("{steps: 10}", "10", "stage 'first': until must be a mapping"),
    ("{steps: 10}", "{share: 10}", "stage 'first': until.share must be above 0 and at most 1"),
    ("{steps: 10}", "{share: 1}", "stage 'second' is never reached"),
    ("{steps: 10}", "{share: yes}", "stage 'first': until.share must be above 0"),
    ("{steps: 10}", "{tokens: 200B}", "stage 'first': until.tokens must be an integer"),
    ("{steps: 10}", "{loss: .nan}", "stage 'first': until.loss must be a finite number"),
    ("below: 0.01, ", "", "stage 'first': gates[0]: gate 'clamped_mass/max': below or above"),
    ("below: 0.01", "blow: 0.01", "gates[0]: there is no field 'blow'; did you mean 'below'?"),
    ("below: 0.01", "below: low", "gates[0]: gate 'clamped_mass/max': below must be a finite"),
    ("below: 0.01", "below: 0.01, above: 1", "below must be more than above"),
    ("statistic: clamped_mass/max", "statistic: 5", "gates[0]: gate: statistic must be a name"),
    ("statistic: clamped_mass/max, ", "", "stage 'first': gates[0]: statistic is missing"),
    ("window: 20", "window: -20", "gates[0]: gate 'clamped_mass/max': window must be an integer"),
    ("window: 20", "window: long", "window must be an integer of at least 1, got 'long'"),
    ("window: 20", "reduce: most", "reduce must be one of worst"),
    ("      - {statistic: clamped_mass/max, below: 0.01, window: 20}", "      5", "must be a list"),
    ("      - {statistic", "      statistics: {statistic", "stage 'first': gates must be a list"),
    ("    until: {steps: 10}", "    on_fail: retry", "stage 'first': on_fail must be one of"),
    ("    until: {steps: 10}", "    on_fail: step_back", "no stage is before it"),
    ("    until: {steps: 10}", "    max_tries: 0", "stage 'first': max_tries must be an integer"),
    ("  - name: second", "  - second", "line 9"),
    (
        "  - name: second\n",
        "  - name: second\n    until: {}\n    gates: 1\n",
        "gates must be a list",
    ),
]


def test_the_text_to_be_spoiled_is_good() -> None:
    assert [stage.name for stage in RolloutRecipe.from_yaml(TEXT).stages] == ["first", "second"]
    assert len(MUTATIONS) > 50


@pytest.mark.parametrize(("old", "new", "message"), MUTATIONS)
def test_mutated_files(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TEXT
    path = tmp_path / "rollout.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        RolloutRecipe.from_yaml(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said


@given(st.text(max_size=60) | st.binary(max_size=40).map(lambda b: b.decode("latin1")))
def test_whatever_the_text_is_the_error_is_ours(text: str) -> None:
    with pytest.raises(ValueError, match=":"):
        RolloutRecipe.from_yaml(f"{text}\n")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.yaml: cannot be read: No such file"):
        RolloutRecipe.from_yaml("nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ValueError, match="must be UTF-8"):
        RolloutRecipe.from_yaml(tmp_path / "latin.yaml")


# -- schema ---------------------------------------------------------------------------------------

TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
}


def complaints(value: Any, schema: Any, whole: Any, at: str = "") -> list[str]:
    """What of JSON schema ours makes use of."""
    if "$ref" in schema:
        schema = {**whole["$defs"][schema["$ref"].rpartition("/")[2]], **schema}
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        return [f"{at}: type"]
    found = [f"{at}: enum"] if "enum" in schema and value not in schema["enum"] else []
    for key, ok in (
        ("minimum", lambda least: value >= least),
        ("maximum", lambda most: value <= most),
        ("exclusiveMinimum", lambda least: value > least),
        ("pattern", lambda pattern: re.search(pattern, value)),
        ("minItems", lambda least: len(value) >= least),
        ("minProperties", lambda least: len(value) >= least),
        ("required", lambda names: all(name in value for name in names)),
    ):
        if key in schema and not ok(schema[key]):
            found.append(f"{at}: {key}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += complaints(item, schema["items"], whole, f"{at}[{i}]")
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema["additionalProperties"]
        for key, item in value.items():
            inner = properties.get(key, others)
            if inner is False:
                found.append(f"{at}.{key}: unknown")
            else:
                found += complaints(item, inner, whole, f"{at}.{key}")
    return found


@pytest.mark.parametrize("name", recipes.names())
def test_the_schema_accepts_what_we_write(name: str) -> None:
    document = yaml.safe_load(recipes.get(name).to_yaml())
    assert complaints(document, json_schema(), json_schema()) == []


def test_the_schema_describes_every_field_and_refuses_others() -> None:
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert all(
            field["description"] for name, field in part["properties"].items() if name != "name"
        )
    found = {
        complaints(yaml.safe_load(text), schema, schema)[0]
        for text in (
            TEXT.replace("steps: 10", "steps: 0"),
            TEXT.replace("steps: 10", "share: 2.0"),
            TEXT.replace("below: 0.01", "blow: 0.01"),
            TEXT.replace("name: mine", "name: my own"),
            TEXT.replace("    until: {steps: 10}", "    on_fail: wait"),
        )
    }
    assert found == {
        ".stages[0].until.steps: minimum",
        ".stages[0].until.share: maximum",
        ".stages[0].gates[0].blow: unknown",
        ".name: pattern",
        ".stages[0].on_fail: enum",
    }


@pytest.mark.parametrize("name", ["1e100", "1e-3", "1.5", "12", "true", "null", "~"])
def test_a_name_that_looks_like_something_else_comes_back_a_text(name: str) -> None:
    recipe = RolloutRecipe(name="a", stages=(Stage(name=name, layers={"*": "bf16"}),))
    assert RolloutRecipe.from_yaml(recipe.to_yaml()) == recipe
