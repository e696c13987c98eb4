"""The page on compatibility is what the tests say."""

from __future__ import annotations

from tests import compatibility


def test_the_page_is_what_the_tests_say() -> None:
    written = compatibility.PAGE.read_text(encoding="utf-8")
    assert written == compatibility.page(), "run `python dev.py compatibility`"


def test_every_kind_has_rows_and_something_is_refused() -> None:
    found = compatibility.rows()
    assert {row.kind for row in found} == set(compatibility.KINDS)
    assert {row.verdict for row in found} == set(compatibility.VERDICTS)
