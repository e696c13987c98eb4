"""Shared by all tests: examples in Markdown are tests, and GPU tests need a GPU."""

from __future__ import annotations

import doctest
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FENCE = re.compile(r"^[ \t]*(```|~~~).*$", flags=re.MULTILINE)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return Page.from_parent(parent, path=file_path) if file_path.suffix == ".md" else None


class Page(pytest.File):
    """A Markdown page; its `>>>` examples run from top to bottom as one program."""

    def collect(self) -> Iterator[pytest.Item]:
        # Without its fence a code block ends in an empty line, and with it the expected output.
        text = FENCE.sub("", self.path.read_text(encoding="utf-8"))
        names = {"__name__": "__main__"}
        page = doctest.DocTestParser().get_doctest(text, names, self.name, str(self.path), 0)
        if page.examples:
            yield Examples.from_parent(self, name="examples", page=page)


class Examples(pytest.Item):
    def __init__(self, *, page: doctest.DocTest, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.page = page

    def runtest(self) -> None:
        output = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        start, quiet = Path.cwd(), logging.root.manager.disable
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)  # pages may write files
            try:
                failed, _ = runner.run(self.page, out=output.write)
            finally:
                os.chdir(start)
                logging.disable(quiet)  # and may silence what other tests listen to
        if failed:
            pytest.fail(output.getvalue(), pytrace=False)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None):
        return super().repr_failure(excinfo, style="value")  # the traceback is all pytest's own

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"examples in {self.path.name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _gpu_multiplies_fp8():
        skip = pytest.mark.skip(reason="no GPU that multiplies FP8")
        for item in on_gpu:
            item.add_marker(skip)


def _gpu_multiplies_fp8() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
