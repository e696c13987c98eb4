"""What jsonargparse says of a configuration in a hundred lines, in one, with the field."""

from __future__ import annotations

import re
from typing import NamedTuple

_KEY = re.compile(r'Parser key "(?P<name>[^"]+)":\s*(?P<rest>.*)')
_CLASS = re.compile(r"Problem with given class_path '(?:[\w.]*\.)?(?P<name>\w+)':\s*(?P<rest>.*)")
_OF_NO_USE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Subclass types expect|Given value|a class path \(str\)"
    r"|a dict with|Not a valid subclass|Expected a <class 'NoneType'>|Import path \S+ does not corr"
)
"""What it says of every type that a value might have had instead."""

_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_MOST = 400


class _Found(NamedTuple):
    place: tuple[str, ...]
    """Fields and classes on the way."""

    indent: int
    text: str


def one_line(message: str) -> str:
    """The cause of an error, as one line that begins with the field.

    Args:
        message: an indented tree of everything that was tried.
    """
    found: list[_Found] = []
    way: list[tuple[int, str]] = []
    for line in message.splitlines():
        bare = line.lstrip()
        indent = len(line) - len(bare)
        text = bare.removeprefix("- ")
        while way and way[-1][0] >= indent:
            way.pop()
        if step := _KEY.match(text) or _CLASS.match(text):
            way.append((indent, step["name"]))
            text = step["rest"]
        if text and not _OF_NO_USE.match(text):
            found.append(_Found(tuple(name for _, name in way), indent, text))
    if not found:
        return " ".join(message.split())
    # What was read furthest is what was meant; the first of equals.
    cause = max(found, key=lambda each: (len(each.place), each.indent))
    told = _in_plain_words(cause.text)
    joined = " " if cause.place and told.startswith(("must be", "has no")) else ": "
    line = joined.join([": ".join(cause.place), told]) if cause.place else told
    return line if len(line) <= _MOST else line[:_MOST] + " ..."


def _in_plain_words(text: str) -> str:
    if found := re.fullmatch(r"Expected an? <class '(\w+)'>\. Got value: (.*)", text):
        return f"must be {_WORDS.get(found[1], found[1])}, got {found[2]!r}"
    if found := re.fullmatch(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", text):
        return f"must be one of {found[1]}, got {found[2]!r}".replace("'", "", found[1].count("'"))
    if found := re.fullmatch(r"Option '(.*)' is not accepted", text):
        return f"has no option {found[1]!r}"
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
