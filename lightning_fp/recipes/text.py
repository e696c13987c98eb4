"""Recipes as YAML: read with errors that name the place, written so that they read back equal."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from lightning_fp.choices import did_you_mean
from lightning_fp.recipes.format_evidence import FormatEvidence
from lightning_fp.recipes.gate import Gate
from lightning_fp.recipes.recipe import RolloutRecipe
from lightning_fp.recipes.stage import Stage
from lightning_fp.shown import shown


class _Loader(yaml.SafeLoader):
    """Safe YAML that takes 1e-3 for a number, as everybody does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            value = self.construct_object(key, deep=True)
            if not isinstance(value, Hashable):
                continue  # the base class has a message for it
            if value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{value!r} is given twice", key.start_mark
                )
            keys.add(value)
        return super().construct_mapping(node, deep)


_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(*_FLOAT)


def is_path(source: str | Path) -> bool:
    """Whether a text is meant as the path of a recipe's file, and not as the recipe itself."""
    if isinstance(source, Path):
        return True
    return "\n" not in source and (source.endswith((".yaml", ".yml")) or ":" not in source)


def read_recipe(source: str | Path) -> RolloutRecipe:
    """See `RolloutRecipe.from_yaml`."""
    if not isinstance(source, (str, Path)):
        raise ValueError(f"recipe must be a path or YAML text, got {type(source).__name__}")
    where = str(source) if is_path(source) else "recipe"
    try:
        text = Path(source).read_text(encoding="utf-8") if is_path(source) else str(source)
        document = yaml.load(text, _Loader)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: must be UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {_one_line(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:  # 2026-99-99 and the like
        raise ValueError(f"{where}: not valid YAML: {error}") from error
    try:
        return _recipe(document)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong in a YAML text, and where."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    alias = "alias" in (getattr(error, "context", None) or "")  # how YAML reads a star
    hint = "; put patterns that begin with '*' in quotes" if alias else ""
    return " ".join(f"{at}{problem}{hint}".split())


# -- reading --------------------------------------------------------------------------------------


def _recipe(document: Any) -> RolloutRecipe:
    values = _fields(document, RolloutRecipe, "the recipe")
    values["stages"] = tuple(
        _stage(stage, f"stages[{i}]") for i, stage in enumerate(_list(values["stages"], "stages"))
    )
    evidence = _list(values.get("evidence", ()), "evidence")
    values["evidence"] = tuple(
        _build(FormatEvidence, _fields(each, FormatEvidence, f"evidence[{i}]"), f"evidence[{i}]")
        for i, each in enumerate(evidence)
    )
    return RolloutRecipe(**values)


def _stage(document: Any, where: str) -> Stage:
    name = document.get("name") if isinstance(document, dict) else None
    if isinstance(name, str) and name:
        where = f"stage {name!r}"
    values = _fields(document, Stage, where)
    gates = _list(values.get("gates", ()), f"{where}: gates")
    values["gates"] = tuple(_gate(gate, f"{where}: gates[{i}]") for i, gate in enumerate(gates))
    return _build(Stage, values, where)


def _gate(document: Any, where: str) -> Gate:
    return _build(Gate, _fields(document, Gate, where), where)


def _build(of: type[Any], values: dict[str, Any], where: str) -> Any:
    try:
        return of(**values)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error


def _fields(document: Any, of: type[Any], where: str) -> dict[str, Any]:
    """A mapping with the fields of a dataclass."""
    known = [field.name for field in fields(of)]
    if not isinstance(document, dict):
        raise ValueError(
            f"{where} must be a mapping with {', '.join(known)}, got {shown(document)}"
        )
    for key in document:
        if key not in known:
            raise ValueError(f"{where}: there is no field {key!r}{_meant(key, known)}")
    for field in fields(of):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in document:
            raise ValueError(f"{where}: {field.name} is missing")
    return dict(document)


def _list(document: Any, where: str) -> list[Any]:
    if not isinstance(document, (list, tuple)):
        raise ValueError(f"{where} must be a list, got {shown(document)}")
    return list(document)


def _meant(key: object, known: Collection[str]) -> str:
    return did_you_mean(key, known) or f"; it has {', '.join(known)}"


# -- writing --------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Indents the items of lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_implicit_resolver(*_FLOAT)  # so that a name such as "1e100" is put in quotes


def write_recipe(recipe: RolloutRecipe) -> str:
    """See `RolloutRecipe.to_yaml`."""
    plain = as_plain(recipe)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def as_plain(value: Any) -> Any:
    """A recipe, or a part of one, as mappings, lists, texts and numbers; defaults are left out."""
    if isinstance(value, (RolloutRecipe, Stage, Gate, FormatEvidence)):
        own = [field for field in fields(value) if field.default is MISSING]
        given = [field for field in fields(value) if field.default is not MISSING]
        kept = [f.name for f in own if getattr(value, f.name) or f.default_factory is MISSING]
        kept += [f.name for f in given if getattr(value, f.name) != f.default]
        ordered = [field.name for field in fields(value) if field.name in kept]
        return {name: as_plain(getattr(value, name)) for name in ordered}
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, tuple) else value
