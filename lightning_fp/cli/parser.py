"""Parsers from signatures: a command's parameters are its arguments, its docstring is their help.

argparse and not jsonargparse, which Lightning's own CLI uses: that one costs a quarter of a second
to import, and of a signature makes `--batch_size`, `--json true` and `--layers+=X`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import sys
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NoReturn, TypeAlias, Union, get_args, get_origin, get_type_hints

from docstring_parser.google import parse

from lightning_fp.choices import nearest

Command: TypeAlias = Callable[..., int]
"""A function whose parameters are of builtin types; it returns the exit code."""

Commands: TypeAlias = Mapping[str, "Command | tuple[str, Commands]"]
"""Commands by name, or a group of them with a sentence about it."""

PROGRAM = "lightning-fp"

_WRONG_USAGE = 2

_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def build_parser(commands: Commands, *, description: str, version: str) -> CommandParser:
    """The parser of the whole command line.

    Args:
        commands: all of them.
        description: what the program is for.
        version: for `--version`.
    """
    parser = CommandParser(prog=PROGRAM, usage=f"{PROGRAM} COMMAND ...", description=description)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    parser.epilog = f"More on a command: {PROGRAM} COMMAND --help"
    _add_commands(parser, commands)
    return parser


def nearest_or_all(name: str, known: Collection[str]) -> str:
    """A clause about the nearest known name, or all of them if none is near.

    >>> nearest_or_all("plam", ["plan", "doctor"]), nearest_or_all("x", ["plan", "doctor"])
    ('did you mean plan?', 'there are plan, doctor')
    """
    near = nearest(name, known)
    return f"there are {', '.join(known)}" if near is None else f"did you mean {near}?"


class CommandParser(argparse.ArgumentParser):
    """A parser that speaks plainly, and in the name of the command that was meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)
        self._given: list[str] = []

    # argparse leaves what a command does not know to the parser above it
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args or ())
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._about_unknown(unknown[0]))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End with one line about what is wrong."""
        print(self.format_usage().strip(), file=sys.stderr)
        print(f"{self.prog}: {self._in_plain_words(message)}", file=sys.stderr)
        self.exit(_WRONG_USAGE)

    def _in_plain_words(self, message: str) -> str:
        if found := re.search(r"invalid choice: '(.*?)' \(choose", message):
            return f"there is no command {found[1]!r}; {nearest_or_all(found[1], self._commands())}"
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            if misspelt := [given for given in self._given if self._is_unknown_option(given)]:
                return self._about_unknown(misspelt[0])
            what = f"{found[1]} is missing"
            return f"{what}: one of {', '.join(self._commands())}" if self._commands() else what
        if found := re.fullmatch(r"argument (\S+?): (.*)", message):
            said = re.sub(r"expected (?:at least )?one argument", "needs a value", found[2])
            said = re.sub(r"ignored explicit argument (.*)", r"takes no value, got \1", said)
            return f"{found[1]} {said}"
        return message

    def _is_unknown_option(self, given: str) -> bool:
        return given.startswith("--") and given.partition("=")[0] not in self._option_string_actions

    def _about_unknown(self, argument: str) -> str:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            return f"does not know what to do with {argument!r}; see {self.prog} --help"
        options = [text for action in self._actions for text in action.option_strings]
        return (
            f"there is no option {name}; {nearest_or_all(name, [o for o in options if o != '-h'])}"
        )

    def _commands(self) -> list[str]:
        found = [each for each in self._actions if isinstance(each.choices, dict)]
        return list(found[0].choices or ()) if found else []


class _Formatter(argparse.HelpFormatter):
    """80 columns wide at most, and as narrow as the terminal."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 80) - 2
        super().__init__(prog, max_help_position=26, width=width)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action.choices, dict):  # argparse forgets that commands are indented
            self._action_max_length += 2


# -- from a signature -----------------------------------------------------------------------------


def _add_commands(parser: CommandParser, commands: Commands) -> None:
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for name, command in commands.items():
        prog = f"{parser.prog} {name}"
        if isinstance(command, tuple):
            about, inner = command
            group = subparsers.add_parser(
                name, prog=prog, usage=f"{prog} COMMAND ...", help=about, description=about
            )
            _add_commands(group, inner)
        else:
            _add_command(subparsers, name, prog, command)


def _add_command(subparsers: Any, name: str, prog: str, command: Command) -> None:
    told = parse(inspect.getdoc(command) or "")
    texts = {each.arg_name: " ".join((each.description or "").split()) for each in told.params}
    about = f"{told.short_description}\n\n{told.long_description or ''}".strip()
    types_of = get_type_hints(command)
    parameters = list(inspect.signature(command).parameters.values())
    places = [_in_usage(each) for each in parameters if each.kind is not each.KEYWORD_ONLY]
    parser = subparsers.add_parser(
        name,
        prog=prog,
        usage=" ".join([prog, *places, "[options]"]),
        help=told.short_description,
        description=about,
    )
    for parameter in parameters:
        _add_argument(parser, parameter, types_of[parameter.name], texts[parameter.name])
    parser.set_defaults(command=command)


def _in_usage(parameter: inspect.Parameter) -> str:
    name = parameter.name.upper()
    if parameter.default is not parameter.empty:
        return f"[{name}]"
    return f"{name} ..." if parameter.annotation == "tuple[str, ...]" else name


def _add_argument(parser: CommandParser, parameter: inspect.Parameter, of: Any, text: str) -> None:
    """One argument: a place where the parameter may be given by position, else an option."""
    name, default = parameter.name, parameter.default
    required = default is parameter.empty
    place = parameter.kind is not parameter.KEYWORD_ONLY
    flag = of is bool and default is False
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if not required:
        options["default"] = list(default) if isinstance(default, tuple) else default
        if not flag and default is not None and default != () and not place:
            shown = str(default).lower() if isinstance(default, bool) else default
            options["help"] += f" (by default {shown})"
    if flag:
        options["action"] = "store_true"
    else:
        metavar = found[1] if (found := re.match(r"([A-Z][A-Z=:]+): ", text)) else name.upper()
        options["metavar"] = metavar.replace("_", "-")
        options["help"] = options["help"].removeprefix(f"{metavar}: ")
        if get_origin(of) is tuple:
            options |= {"nargs": "+"} if place else {"action": "append"}
            of, _ = get_args(of)
        elif place and not required:
            options["nargs"] = "?"
        options["type"] = _reader(of)
        if choices := _choices(of):
            if place:
                options["help"] = f"{', '.join(choices)}; {options['help']}"
            else:
                options["metavar"] = "|".join(choices)
    parser.add_argument(name if place else f"--{name.replace('_', '-')}", **options)


def _reader(of: Any) -> Callable[[str], Any]:
    """What turns a text into a value of a type, or says in plain words what it must be."""
    if get_origin(of) in (Union, types.UnionType):
        (of,) = (each for each in get_args(of) if each is not type(None))
    choices = _choices(of)

    def read(text: str) -> Any:
        try:
            value = text if choices else _TRUTH[text.lower()] if of is bool else of(text)
        except (ValueError, KeyError):
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(of)
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None
        if choices and text not in choices:
            one_of = f"must be one of {', '.join(choices)}, got {text!r}"
            near = nearest(text, choices)
            meant = "" if near is None else f"; did you mean {near}?"
            raise argparse.ArgumentTypeError(one_of + meant)
        return value

    return read


def _choices(of: Any) -> list[str]:
    return list(get_args(of)) if get_origin(of) is Literal else []
