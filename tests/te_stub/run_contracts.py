"""Runs the contracts, in a process that is made to believe in a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

OPTIONS = ["-q", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins were imported already


def main() -> None:
    sys.exit(pytest.main([*OPTIONS, str(Path(__file__).with_name("contracts.py"))]))
