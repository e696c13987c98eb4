"""The pages: short, complete, and a word in a special sense is explained at its first use."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

import lightning_fp
from lightning_fp import FP8Precision
from lightning_fp.layers import Backend, Frozen
from lightning_fp.layers.format import QuantiseLike
from lightning_fp.stepping.base_precision import BasePrecision

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))

WORDS = 1500
TERMS = {
    "amax": r"amax(es)?",
    "amax-history": r"(amax|scaling) histor(y|ies)",
    "clamped-mass": r"clamped mass",
    "culprit": r"culprits?",
    "demotion": r"demot(ion|ions|ed|es|e)",
    "emulated": r"emulat(ed|ion|es)",
    "fqn": r"FQN",
    "headroom": r"headroom",
    "high-precision": r"high precision",
    "low-precision": r"low precision",
    "native": r"native",
    "operand": r"operands?",
    "probation": r"probation",
    "replay": r"replay(s|ed|ing)?",
    "rung": r"rungs?",
    "safety-ladder": r"(safety )?ladder",
    "snapshot": r"snapshots?",
    "sqnr": r"SQNR",
    "suspicion": r"suspicions?",
    "underflow": r"underflow(s|ed)?",
    "verdict": r"verdicts?",
}
"""Anchors of docs/glossary.md, and the words that should lead there."""

WRITTEN_BY_TOOLS = {"compatibility.md"}
"""Their text comes from the tests."""


def prose(text: str) -> str:
    """The page with all that is not prose blanked out, so that places stay what they are."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    text = re.sub(r"^```.*?^```", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]+`", blank, text)
    text = re.sub(r"^#.*$", blank, text, flags=re.MULTILINE)
    return re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)


def links(text: str) -> list[tuple[int, int, str]]:
    """First and last place of each link's text, and where it leads."""
    return [(m.start(1), m.end(1), m[2]) for m in re.finditer(r"\[([^\]]+)\]\(([^)]*)\)", text)]


def unexplained(text: str) -> dict[str, int]:
    """Terms whose first use in a page leads nowhere, and the place of that use."""
    plain, found = prose(text), links(text)
    targets = [(m.start(), m.end()) for m in re.finditer(r"\]\([^)]*\)", text)]
    bad: dict[str, int] = {}
    for anchor, pattern in TERMS.items():
        for use in re.finditer(rf"\b({pattern})\b", plain, flags=re.IGNORECASE):
            if any(begin <= use.start() < end for begin, end in targets):
                continue  # in the address of a link
            if not any(begin <= use.start() < end for begin, end, _ in found):
                bad[anchor] = use.start()
            break
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_term_is_explained_where_it_first_stands(page: Path) -> None:
    if page.name in WRITTEN_BY_TOOLS | {"glossary.md"}:
        pytest.skip("explains terms itself, or is written by a tool")
    text = page.read_text()
    bad = [f"{a}, line {text[:at].count(chr(10)) + 1}" for a, at in unexplained(text).items()]
    assert not bad, f"link the first use to glossary.md: {bad}"


def test_a_term_without_a_link_is_noticed() -> None:
    assert unexplained("`amax`, then amax.\n# amax\n") == {"amax": 13}
    assert unexplained("See the [amax](glossary.md#amax), and the amax.") == {}


def test_every_term_has_its_entry() -> None:
    headings = re.findall(r"^### (.+)$", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert TERMS.keys() <= anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    """Tables that a script fills do not count."""
    text = re.sub(r"<!-- begin.*?<!-- end", "", page.read_text(), flags=re.DOTALL)
    assert len(text.split()) <= WORDS


def test_the_table_of_options_is_complete() -> None:
    page = (DOCS / "quick-start.md").read_text()
    table = re.search(r"All options of `FP8Precision`:\n\n(.*?)\n\n", page, flags=re.DOTALL)
    assert table is not None
    rows = {row.split("`")[1]: row for row in table[1].splitlines()[2:]}
    assert rows.keys() == inspect.signature(FP8Precision).parameters.keys()
    for option, values in {
        "backend": get_args(Backend),
        "base": set(get_args(BasePrecision)) - {"16-true"},  # refused with FP8 layers
        "frozen": get_args(Frozen),
        "quantise_like": set(get_args(QuantiseLike)) - {"master"},
        "scaling": ("dynamic", "delayed", "auto", "rowwise", "rowwise-gw-hp", "block", "mx"),
    }.items():
        for value in values:
            assert f'"{value}"' in rows[option]


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    listed = set(re.findall(r"^\.\. auto\w+:: lightning_fp\.(\w+)$", pages, flags=re.MULTILINE))
    assert listed == set(lightning_fp.__all__)
