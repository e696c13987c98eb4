"""What the package asks for is what it uses, and its pages name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {"pyyaml": "yaml", "transformer-engine": "transformer_engine"}
"""Where a package is imported under another name."""


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=! ;]", line)[0] for line in requirements}


def source() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "lightning_fp").rglob("*.py"))


@pytest.mark.parametrize("extra", [*sorted(EXTRAS.keys() - {"dev", "docs"}), ""])
def test_what_is_asked_for_is_imported(extra: str) -> None:
    """By the package itself: what only tests and pages need is in `dev` and `docs`."""
    text = source()
    for package in packages(EXTRAS[extra] if extra else PROJECT["dependencies"]):
        if package == "jsonargparse":  # by Lightning, for its LightningCLI
            continue
        module = MODULES.get(package, package)
        assert re.search(rf"(import|from) {module}\b|\(\"{module}[\".]", text), package


def test_targets_install_extras_that_there_are() -> None:
    asked = re.findall(
        r"^    install\((\{.*\}|\w+(?:\(\))?)\)$", (ROOT / "dev.py").read_text(), re.M
    )
    assert len(asked) >= 5
    assert all(extra in EXTRAS for each in asked for extra in re.findall(r'"(\w+)"', each))


def test_the_first_snippet_ends_in_a_report() -> None:
    assert {"lightning", "jinja2"} <= packages(PROJECT["dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_what_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([\w./:-]*[./][\w./:-]+)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_extras_that_there_are_and_install_from_the_clone(page: Path) -> None:
    for where, named in re.findall(r"pip install \"([\w.-]*)\[([\w,]+)\]", page.read_text()):
        assert where == ".", "the package is on no index"
        assert set(named.split(",")) <= EXTRAS.keys()


def test_no_address_is_made_up() -> None:
    """There is none yet: whoever adds one takes this test out."""
    assert "urls" not in PROJECT
