"""What users import: every name that README, docs and examples use, with its signature."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

import lightning_fp
from lightning_fp import DivergenceDetector, convert

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "public_names.txt"

PAGES = ("README.md", "docs/**/*.md", "examples/**/*.md", "examples/**/*.py", "examples/**/*.y*ml")

PROMISED = (
    "lightning_fp.DivergenceDetector.init",
    "lightning_fp.DivergenceDetector.step",
    "lightning_fp.DivergenceDetector.state_dict",
    "lightning_fp.DivergenceDetector.load_state_dict",
    "lightning_fp.PrecisionMap.formats",
    "lightning_fp.PrecisionMap.set",
    "lightning_fp.RolloutRecipe.from_yaml",
    "lightning_fp.RolloutRecipe.to_yaml",
    "lightning_fp.metrics.TrainingInferenceMismatch.compute",
    "lightning_fp.metrics.TrainingInferenceMismatch.update",
    "lightning_fp.metrics.ClampFraction.update",
    "lightning_fp.metrics.ClampedMass.update",
    "lightning_fp.metrics.UnderflowFraction.update",
    "lightning_fp.records.read_events",
    "lightning_fp.records.read_statistics",
    "lightning_fp.recipes.get",
    "lightning_fp.register.undo",
)
"""What checks from outside call, whether or not a page shows it."""

_REGISTER = "lightning_fp.register"

_FROM = re.compile(r"from (lightning_fp[\w.]*) import (\([^)]*\)|[^\n#`]+)")
_MODULE = re.compile(r"import (lightning_fp(?:\.\w+)*)")
_CLASS_PATH = re.compile(r"class_path: *[\"']?(lightning_fp(?:\.\w+)+)")


def listed() -> str:
    """The list as it is in `FILE`: a line per name."""
    names = {f"lightning_fp.{name}" for name in lightning_fp.__all__}
    names |= {
        f"lightning_fp.metrics.{name}"
        for name in importlib.import_module("lightning_fp.metrics").__all__
    }
    names |= {*PROMISED}
    for page in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)}):
        names |= set(used(page.read_text(encoding="utf-8")))
    registered = _REGISTER in sys.modules
    lines = [f"{name}{described(name)}" for name in sorted(names)]
    if not registered:  # to import it patches Lightning, which looking at it must not
        sys.modules.pop(_REGISTER).undo()
    return "\n".join([*lines, *_fields()]) + "\n"


def used(text: str) -> Iterator[str]:
    """The names of the package that a page imports, in full.

    >>> list(used(">>> from lightning_fp import Gate, convert as c  # both"))
    ['lightning_fp.Gate', 'lightning_fp.convert']
    """
    for module, imported in _FROM.findall(text):
        plain = re.sub(r"#.*|>>>|\.\.\.|[()]", "", imported)
        for name in plain.replace("\n", " ").split(";")[0].split(","):
            if name.strip():
                yield f"{module}.{name.split()[0]}"
    yield from _MODULE.findall(text)
    yield from _CLASS_PATH.findall(text)


def described(name: str) -> str:
    """What stands behind a name: its signature, or what kind of thing it is."""
    found = resolved(name)
    if inspect.ismodule(found):
        return ": module"
    if inspect.isclass(found) and issubclass(found, BaseException):
        return ": exception"  # made by us only
    if callable(found):
        return signature(found)
    return ": property" if isinstance(found, property) else f": {type(found).__name__}"


def resolved(name: str) -> Any:
    """A module, or an attribute of one.

    Raises:
        ImportError: if there is nothing of this name any more.
    """
    first, *parts = name.split(".")
    found: Any = importlib.import_module(first)
    for number, part in enumerate(parts, 2):
        if not hasattr(found, part):  # `from a import b` takes a module only then, too
            try:
                importlib.import_module(".".join(name.split(".")[:number]))
            except ModuleNotFoundError:
                raise ImportError(
                    f"{name} cannot be imported, and README, docs, examples or a check use it"
                ) from None
        found = getattr(found, part)
    return found


def signature(function: Any) -> str:
    """Parameters, defaults and what is returned, with annotations as they are written."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parts: list[str] = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        kind = parameter.kind
        if kind is parameter.VAR_POSITIONAL or (
            kind is parameter.KEYWORD_ONLY and not keyword_only
        ):
            keyword_only = True
            if kind is parameter.KEYWORD_ONLY:
                parts.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not empty:
            text += f": {_written(parameter.annotation)}"
        if parameter.default is not empty:
            text += f" = {_value(parameter.default)}"
        parts.append(text)
    returned = signature.return_annotation
    arrow = "" if returned in (empty, None, "None") else f" -> {_written(returned)}"
    return f"({', '.join(parts)}){arrow}"


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "?")


def _value(default: Any) -> str:
    """A default; of an object its class, because its representation may tell where it lives."""
    text = repr(default)
    return type(default).__name__ if "0x" in text or "lightning_fp." in text else text


def _fields() -> Iterator[str]:
    """The fields of what functions return, which have no public name themselves."""
    row = convert(nn.Sequential(nn.Linear(16, 16)), "fp8-dynamic").layers[0]
    detector = DivergenceDetector()
    _, decision = detector.step(detector.init(), loss=1.0)
    for name, record in (
        ("ConversionReport.layers[]", row),
        ("DivergenceDetector.step()[1]", decision),
    ):
        for field in dataclasses.fields(record):
            yield f"lightning_fp.{name}.{field.name}: {_written(field.type)}"
        for attribute, value in vars(type(record)).items():
            if isinstance(value, property):
                yield f"lightning_fp.{name}.{attribute}: property"
