"""From "module:factory" to a user's model and an example of its input."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_fp.shown import a_kind


@dataclass(frozen=True, kw_only=True)
class UserModel:
    """What a factory gave."""

    model: nn.Module

    example_input: Any = None
    """Arguments of one forward, or None if none is known."""

    is_placeholder: bool = False
    """Whether the example is a library's, of a few tokens, and says nothing of a batch."""


def load_model(reference: str) -> UserModel:
    """Build the model that a factory returns, on the meta device if the factory can.

    Args:
        reference: "package.module:factory" or "path/to/file.py:factory"; the factory takes no
            arguments and returns a module, or a module and an example of its input.

    Returns:
        The model; where the factory gave no example input, the `example_input_array` of a
        LightningModule or the `dummy_inputs` of a transformers model.

    Raises:
        ValueError: if there is no such factory, it fails, or it returns something else.
    """
    built = build(reference, meta=True)
    model, example_input = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{reference} must return an nn.Module, or an nn.Module and an example input, got"
            f" {type(model).__name__}"
        )
    placeholder = False
    for attribute in ("example_input_array", "dummy_inputs"):
        if example_input is None:
            example_input = getattr(model, attribute, None)
            placeholder = example_input is not None and attribute == "dummy_inputs"
    return UserModel(model=model, example_input=example_input, is_placeholder=placeholder)


def build(reference: str, *, meta: bool = False) -> Any:
    """What a factory returns.

    Args:
        reference: "package.module:factory" or "path/to/file.py:factory".
        meta: whether to build on the meta device, without memory, if the factory can.

    Raises:
        ValueError: if there is no such factory, or it fails.
    """
    factory = find_factory(reference)
    try:
        if meta:
            with suppress(Exception), torch.device("meta"):  # many constructors need real tensors
                return _call(factory)
        return _call(factory)
    except Exception as error:
        raise factory_error(reference, error) from error


def _call(factory: Any) -> Any:
    """Call the factory, and a LightningModule's hook that builds the rest of the model."""
    built = factory if isinstance(factory, nn.Module) else factory()
    model = built[0] if isinstance(built, tuple) and built else built
    configure_model = getattr(model, "configure_model", None)
    if callable(configure_model):
        configure_model()
    return built


def factory_error(reference: str, error: Exception) -> ValueError:
    """What a user's factory raised, and where, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ValueError(
        f"{reference} raised {type(error).__name__}: {error}"
        f" ({place.filename}, line {place.lineno})"
    )


def find_factory(reference: str) -> Any:
    """The callable that "module:name" or "file.py:name" refers to.

    Raises:
        ValueError: if there is none.
    """
    source, colon, name = reference.rpartition(":")
    if not (source and colon and name):
        raise ValueError(
            f"factory must be 'package.module:factory' or 'path/to/file.py:factory', got"
            f" {reference!r}"
        )
    _put_on_path(Path.cwd())
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        public = [
            key
            for key, value in vars(module).items()
            if key[0] != "_" and getattr(value, "__module__", None) == module.__name__
        ]
        raise ValueError(
            f"{source} has no {name!r}; it has {', '.join(public) or 'nothing to call'}"
        ) from error
    if not callable(found):
        raise ValueError(f"{reference} must be callable, got {a_kind(found)}")
    return found


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    _put_on_path(path.resolve().parent)  # as if it were run as a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    return module


def _put_on_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
