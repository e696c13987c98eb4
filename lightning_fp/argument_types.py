"""What a user passes is of the type that the signature says; else one line names the argument.

Python checks no annotation. A text given for a number would fail far away, in a comparison that
names nothing, or not at all: `fp8_eval="no"` is true, and `log_layers="*head"` is five globs.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import sys
import types
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, ForwardRef, Literal, TypeVar, Union, get_args, get_origin

from lightning_fp.shown import shown

T = TypeVar("T", bound=Callable[..., Any])
R = TypeVar("R")

_constructors: dict[type[Any], Callable[..., Any]] = {}

_WORDS: Mapping[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "None",
    None: "None",
    Path: "a path",
    Any: "anything",
}
_INT64 = 2**63
"""What a tensor of whole numbers can hold."""


def checked(what: T) -> T:
    """A function, or the constructor of a class, that refuses arguments of other types.

    >>> @checked
    ... def every(steps: int) -> int:
    ...     return steps
    >>> every("two")
    Traceback (most recent call last):
    ValueError: steps must be a whole number, got 'two'

    A number of NumPy, or a tensor of one value, arrives as Python's own: `numpy.bool_(True)` as
    True. Names that only type checkers import are not checked, nor is which of the texts of a
    `Literal` it is: what takes the value knows what was meant. NaN is no number.
    """
    if isinstance(what, type):
        what.__init__ = _checked(what.__init__)
        return what  # pyright: ignore[reportReturnType]
    return _checked(what)  # pyright: ignore[reportReturnType]


def _checked(function: Callable[..., Any], *, nan: bool = False) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        # At the first call: an annotation may name what its module defines further down.
        known = vars(sys.modules[function.__module__])
        return {name: _resolved(each.annotation, known) for name, each in parameters}

    parameters = [
        (name, each)
        for name, each in signature.parameters.items()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)  # TypeError, as without this
        given = bound.arguments
        for name, hint in hints().items():
            if name not in given:
                continue
            given[name] = _as_asked(given[name], hint)
            if not fits(given[name], hint, nan=nan):
                raise _refused(name, hint, given[name])
        return function(*bound.args, **bound.kwargs)

    return call


def built(kind: type[R], values: Mapping[str, Any]) -> R:
    """A record from values that come from elsewhere, such as a checkpoint.

    Args:
        kind: a dataclass.
        values: by field; lists stand for tuples.

    Raises:
        ValueError: if one is of another type, or a field is missing or unknown.
    """
    made = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    make = _constructors.setdefault(kind, _checked(kind, nan=True))
    try:
        return make(**made)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


def _refused(name: str, hint: Any, value: object) -> ValueError:
    words = in_words(hint)
    if isinstance(value, int) and abs(value) >= _INT64:
        words = words.replace(_WORDS[int], f"{_WORDS[int]} of at most 64 bits")
    return ValueError(f"{name} must be {words}, got {shown(value)}")


def pythons_own(value: Any) -> Any:
    """A single number or truth value of NumPy or torch as Python's own; all else as it is.

    >>> import torch
    >>> pythons_own(torch.tensor(3)), pythons_own("three")
    (3, 'three')
    """
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        own = value.item()
    except Exception:  # of a tensor without data, for example
        return value
    return own if isinstance(own, (bool, int, float)) else value


def _as_asked(value: Any, hint: Any) -> Any:
    """`pythons_own` where a number is asked for, and not, say, a tensor or anything."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    numbers_alone = all(kind in (bool, int, float) or not fits(value, kind) for kind in kinds)
    own = pythons_own(value) if numbers_alone else value
    return own if fits(own, hint) else value


def _resolved(annotation: Any, known: Mapping[str, Any]) -> Any:
    """The type that an annotation means; Any where it names what is not imported at run time."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        found = eval(annotation, dict(known))
    except (NameError, AttributeError, TypeError):
        return Any
    return Any if _is_named(found) else found


def _is_named(hint: Any) -> bool:
    """Whether it is an alias of names that are not imported, or has one inside."""
    if isinstance(hint, (str, ForwardRef)):
        return True
    return get_origin(hint) is not Literal and any(_is_named(each) for each in get_args(hint))


def fits(value: object, hint: Any, *, nan: bool = False) -> bool:
    """Whether a value is of a type, as far as can be told without using it up.

    >>> fits(3, float), fits(True, int), fits("*head", "Sequence[str]")
    (True, False, True)

    Args:
        value: anything.
        hint: an annotation; one that cannot be checked fits all.
        nan: whether NaN is a number.
    """
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each, nan=nan) for each in inside)
    if origin is Literal:
        return isinstance(value, tuple({type(each) for each in inside}))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return (
            isinstance(value, numbers.Real)
            and not isinstance(value, bool)
            and _is_float(value, nan)
        )
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            return False
        return -_INT64 <= value.__index__() < _INT64
    kind = origin if isinstance(origin, type) else hint
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind is Path:
        return isinstance(value, os.PathLike)
    if isinstance(value, (str, bytes)) and kind not in (str, bytes, object):
        return False  # no sequence of texts, though Python takes it for one
    try:
        if not isinstance(value, kind):
            return False
    except TypeError:  # a TypedDict, for example
        return True
    return _elements_fit(value, kind, inside, nan)


def _is_float(value: Any, nan: bool) -> bool:
    try:
        return not math.isnan(value) or nan
    except OverflowError:  # a whole number that is larger than all of them
        return False


def _elements_fit(value: Any, kind: type[Any], inside: tuple[Any, ...], nan: bool) -> bool:
    if not inside:
        return True
    if issubclass(kind, Mapping):
        of_key, of_value = inside
        return all(fits(k, of_key) and fits(v, of_value, nan=nan) for k, v in value.items())
    if issubclass(kind, (list, AbstractSet)) or kind.__name__ in ("Sequence", "Collection"):
        return all(fits(each, inside[0], nan=nan) for each in value)
    if kind is tuple and inside[-1] is Ellipsis:
        return all(fits(each, inside[0], nan=nan) for each in value)
    return True


def in_words(hint: Any) -> str:
    """What a message says of a type.

    >>> in_words(int | None)
    'a whole number or None'
    """
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in inside))
    if origin is Literal:
        return " or ".join(repr(each) for each in inside)
    if hint in _WORDS:
        return _WORDS[hint]
    kind: Any = origin if isinstance(origin, type) else hint
    name = str(getattr(kind, "__name__", kind))
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return f"a dict from {_plural(inside[0])} to {_plural(inside[1])}" if inside else "a dict"
    if inside and name in ("Sequence", "Collection", "tuple", "list", "set", "frozenset"):
        return f"a list of {_plural(inside[0])}"
    return "a function" if name == "Callable" else f"{_article(name)} {name}"


def _plural(hint: Any) -> str:
    words = {str: "texts", int: "whole numbers", float: "numbers", Any: "values"}
    return words.get(hint) or f"{in_words(hint).removeprefix('a ').removeprefix('an ')}s"


def _article(name: str) -> str:
    return "an" if name[:1] in "AEIOU" or name.startswith(("FP", "LR")) else "a"
