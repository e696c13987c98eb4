"""Tables on narrow screens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_fp.terminal import FittedTable

WORDS = [
    "underflow",
    "blocks.0.attention.q_proj",
    "fp8-dynamic",
    "10.0 dB",
    "too small to gain",
    "",
]


def printed(table: FittedTable, width: int) -> list[str]:
    console = Console(width=width, record=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def example(*cells: str) -> FittedTable:
    table = FittedTable("A title", "layer", "how much", "why", right=("how much",))
    table.add_row(*cells)
    return table


def test_columns_are_as_wide_as_their_text_where_there_is_room() -> None:
    lines = printed(example("blocks.0.fc", "1.0 dB", "too small to gain"), 80)
    assert lines == [
        "A title",
        "",
        "layer        how much  why",
        "─" * 40,
        "blocks.0.fc    1.0 dB  too small to gain",
        "",
    ]


def test_lines_break_between_words_and_keep_numbers_with_their_unit() -> None:
    lines = printed(example("blocks.0.fc", "1.0 dB", "too small to gain"), 31)
    assert lines[2:] == [
        "                how",
        "layer          much  why",
        "─" * 30,
        "blocks.0.fc  1.0 dB  too small",
        "                     to gain",
        "",
    ]


def test_names_break_after_their_dots_where_words_do_not_fit() -> None:
    lines = printed(example("blocks.0.attention.q_proj", "1.0 dB", "small"), 30)
    assert [line.split()[0] for line in lines[5:8]] == ["blocks.0.", "attention.", "q_proj"]


def test_rows_become_lists_where_nothing_else_fits() -> None:
    lines = printed(example("blocks.0.fc", "1.0 dB", "small"), 14)
    assert lines[2:5] == ["layer:", "blocks.0.fc", "how much: 1.0"]


def test_markup_and_several_lines_in_a_cell() -> None:
    lines = printed(example("a\n[dim]input[/dim]", "1", "b"), 80)
    assert [line.split()[0] for line in lines[4:6]] == ["a", "input"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from(WORDS), min_size=3, max_size=3), max_size=3),
    width=st.integers(40, 120),
)
def test_never_wider_than_the_screen_and_no_word_lost(rows: list[list[str]], width: int) -> None:
    table = FittedTable("", "layer", "how much", "why", right=("how much",))
    for row in rows:
        table.add_row(*row)
    lines = printed(table, width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for row in rows:
        for part in " ".join(row).replace(".", ". ").split():
            assert part in text
