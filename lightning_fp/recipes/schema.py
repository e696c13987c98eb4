"""The JSON schema of recipes, for editors: made from the dataclasses and their docstrings."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from lightning_fp.format_names import TABLE
from lightning_fp.recipes.builtin import RECIPES
from lightning_fp.recipes.format_evidence import FormatEvidence
from lightning_fp.recipes.gate import Gate
from lightning_fp.recipes.recipe import RolloutRecipe
from lightning_fp.recipes.stage import CONFIGURED, Stage, Until

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean"}

_BOUNDS: Mapping[tuple[type[Any], str], dict[str, Any]] = {
    (RolloutRecipe, "stages"): {"minItems": 1},
    (RolloutRecipe, "name"): {"pattern": r"^[\w.-]+$", "examples": list(RECIPES)},
    (Stage, "layers"): {
        "minProperties": 1,
        "additionalProperties": {
            "type": "string",
            "description": "; ".join(f"{row.name}: {row.help}" for row in TABLE),
            "examples": [CONFIGURED, *(row.name for row in TABLE)],
        },
    },
    (Stage, "max_tries"): {"minimum": 1},
    (Gate, "window"): {"minimum": 1},
    (Until, "steps"): {"minimum": 1},
    (Until, "tokens"): {"minimum": 1},
    (Until, "share"): {"exclusiveMinimum": 0, "maximum": 1},
}
"""What a schema can say of the checks in `__post_init__`."""


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a recipe's YAML file."""
    parts = {part.__name__: _object(part) for part in (Stage, Gate, Until, FormatEvidence)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lightning_fp rollout recipe",
        **_object(RolloutRecipe),
        "$defs": parts,
    }


def _object(of: type[Any]) -> dict[str, Any]:
    """The schema of a dataclass or a TypedDict."""
    hints, texts = get_type_hints(of), _texts(of)
    required: list[str] = []
    if not is_typeddict(of):
        for field in fields(of):
            if field.default is MISSING and field.default_factory is MISSING:
                required.append(field.name)
    summary, *_ = (inspect.getdoc(of) or "").partition("\n")
    properties = {
        name: {**_type(hint), **_BOUNDS.get((of, name), {}), "description": texts.get(name, "")}
        for name, hint in hints.items()
    }
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _type(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0])}
    if origin in (Union, types.UnionType):
        (kept,) = [argument for argument in arguments if argument is not type(None)]
        return _type(kept)  # None is written by leaving the field out
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _texts(of: type[Any]) -> dict[str, str]:
    """The docstring under each field."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(of))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
