"""Tables that fit the terminal: lines break between words, or after a dot in a long name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

_GAP = 2
"""Columns of space between two columns of a table."""

_WORDS = re.compile(r"\S+\s*")
_PARTS = re.compile(r"[^\s.,/=]*[.,/=]*\s*")
"""What a line does not break in: words; parts of names, where words are too long."""


class FittedTable(Table):
    """A table in the one style of the package, never wider than the screen.

    rich breaks a line inside a word as soon as a table is too wide. Here columns keep the width of
    their longest word; where that does not fit, of the longest part of a name; and where not even
    that fits, each row is printed as a list.
    """

    def __init__(
        self, title: str, *columns: str, right: Sequence[str] = (), bare: bool = False
    ) -> None:
        """Begin a table.

        Args:
            title: above it; may be empty.
            columns: headings.
            right: those whose cells are numbers.
            bare: whether headings and the lines around them are left out.
        """
        super().__init__(title=title or None, box=box.SIMPLE_HEAD, show_header=not bare)
        for column in columns:
            self.add_column(column, justify="right" if column in right else "left")

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        if self.title:
            yield Text(str(self.title), style="bold")
            yield ""
        columns = [
            [_text(console, cell) for cell in (column.header, *column.cells)]
            for column in self.columns
        ]
        room = options.max_width - _GAP * (len(columns) - 1)
        for pieces in (_WORDS, _PARTS):
            if widths := self._widths(columns, room, pieces):
                yield self._with_widths(columns, widths, pieces)
                break
        else:
            yield from _as_lists(columns)
        if self.show_header or self.title:
            yield ""

    def _widths(
        self, columns: Sequence[Sequence[Text]], room: int, pieces: re.Pattern[str]
    ) -> list[int] | None:
        """The width of each column, so that together they have room; None if they cannot."""
        least: list[int] = []
        most: list[int] = []
        for column, (heading, *cells) in zip(self.columns, columns, strict=True):
            heading = heading if self.show_header else Text()
            texts = [cell.plain for cell in cells]
            lines = max((len(line) for text in texts for line in text.split("\n")), default=0)
            numbers = column.justify == "right"
            longest = max((_least(text, pieces, numbers=numbers) for text in texts), default=0)
            least.append(max(_longest(pieces, heading.plain), longest))
            most.append(max(len(heading.plain), lines))
        spare = room - sum(least)
        if spare < 0:
            return None
        wanted = [high - low for low, high in zip(least, most, strict=True)]
        share = min(1.0, spare / max(sum(wanted), 1))
        return [low + int(more * share) for low, more in zip(least, wanted, strict=True)]

    def _with_widths(
        self, columns: Sequence[Sequence[Text]], widths: Sequence[int], pieces: re.Pattern[str]
    ) -> Table:
        grid = Table(
            box=box.SIMPLE_HEAD if self.show_header else None,
            show_header=self.show_header,
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP - 1 if self.show_header else _GAP, 0, 0),
        )
        wrapped = [
            [_wrapped(cell, width, pieces) for cell in column]
            for column, width in zip(columns, widths, strict=True)
        ]
        for column, cells, width in zip(self.columns, wrapped, widths, strict=True):
            grid.add_column(cells[0], justify=column.justify, width=width, no_wrap=True)
        for index, row in enumerate(self.rows, start=1):
            grid.add_row(*(cells[index] for cells in wrapped), style=row.style)
        return grid


def _least(text: str, pieces: re.Pattern[str], *, numbers: bool) -> int:
    """The width that a cell must have; a number and its unit stay together."""
    if numbers and text[:1] in tuple("+-0123456789"):
        return max(map(len, text.split("\n")))
    return _longest(pieces, text)


def _longest(pieces: re.Pattern[str], text: str) -> int:
    return max((len(piece.rstrip()) for piece in pieces.findall(text)), default=0)


def _wrapped(text: Text, width: int, pieces: re.Pattern[str]) -> Text:
    """The same text with line ends, so that no line is wider."""
    offsets: list[int] = []
    begin = 0
    for piece in pieces.finditer(text.plain):
        newline = text.plain.rfind("\n", begin, piece.start())
        begin = newline + 1 if newline >= 0 else begin
        if piece.start() > begin and len(piece[0].rstrip()) + piece.start() - begin > width:
            offsets.append(piece.start())
            begin = piece.start()
    lines = text.divide(offsets)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


def _text(console: Console, cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)


def _as_lists(columns: Sequence[Sequence[Text]]) -> Iterator[Text]:
    for row in zip(*(column[1:] for column in columns), strict=True):
        for heading, cell in zip((column[0] for column in columns), row, strict=True):
            if cell.plain:
                yield Text.assemble((f"{heading.plain}: " if heading.plain else "", "dim"), cell)
        yield Text("")
