"""One HTML file from the records of one or several runs; it needs no network and no other file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from lightning_fp import __version__
from lightning_fp.argument_types import checked
from lightning_fp.report.draw.parts import Chart, Section
from lightning_fp.report.read.cost import RunCost, run_cost
from lightning_fp.report.read.run_records import RunRecords, names_of, read_records
from lightning_fp.report.sections.answer import answer
from lightning_fp.report.sections.compare import comparison
from lightning_fp.report.sections.every_section import sections
from lightning_fp.report.sections.headline import alarming, headline, key_figures, low_precision
from lightning_fp.report.sections.missing import lacking
from lightning_fp.report.sections.title import particulars, title


class _Charts:
    """Numbers the charts as the template comes by them."""

    def __init__(self) -> None:
        self._specs: list[Chart] = []

    def add(self, spec: Chart) -> int:
        self._specs.append({key: value for key, value in spec.items() if key != "table"})
        return len(self._specs) - 1

    def json(self) -> str:
        """All of them, harmless inside of a script element."""
        text = json.dumps(self._specs, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


def read_runs(
    run_dirs: Sequence[str | Path], baseline: str | Path | None = None
) -> tuple[list[RunRecords], list[RunCost]]:
    """The records of runs and what each cost.

    Args:
        run_dirs: the runs' directories.
        baseline: a run in high precision to compare times with; by default the one that a run's
            own settings name, or the only one of several that is in high precision throughout.

    Raises:
        ValueError: if there are none, or one has no records.
    """
    if not run_dirs:
        raise ValueError("run_dirs must have at least one directory, got none")
    named = zip(run_dirs, names_of(run_dirs), strict=True)
    runs = [read_records(run_dir, name=name) for run_dir, name in named]
    given = None if baseline is None else read_records(baseline)
    among = _baseline_among(runs)
    others = [None if run is among else given or _own_baseline(run) or among for run in runs]
    costs = [run_cost(run, other) for run, other in zip(runs, others, strict=True)]
    runs = [replace(run, baseline=other) for run, other in zip(runs, others, strict=True)]
    return runs, costs


@checked
def write_report(
    run_dirs: Sequence[str | Path], path: str | Path, *, baseline: str | Path | None = None
) -> Path:
    """Write the report of one run, or a comparison of several.

    Args:
        run_dirs: the runs' directories; the runs may still go on, or have crashed.
        path: the HTML file; its directory is made if it is not there.
        baseline: as for `read_runs`.

    Returns:
        `path`.

    Raises:
        ValueError: if a run has no records.
        ImportError: without jinja2.
    """
    _jinja2()
    runs, costs = read_runs(run_dirs, baseline)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(runs, costs), encoding="utf-8")
    return target


def render(runs: Sequence[RunRecords], costs: Sequence[RunCost]) -> str:
    """The page.

    Args:
        runs: their records.
        costs: what each cost.
    """
    return _render(
        "report.html",
        title=f"{', '.join(title(run) for run in runs)}: run report",
        runs=list(zip(runs, costs, strict=True)),
        title_of=title,
        particulars=particulars,
        answer=answer,
        headline=headline,
        alarming=alarming,
        key_figures=key_figures,
        sections=sections,
        lacking=lacking,
        comparison=comparison(runs, costs) if len(runs) > 1 else None,
    )


def render_sections(
    *, kind: str, title: str, headline: str, sections: Sequence[Section], source: str
) -> str:
    """A page of sections, of something else than runs' records.

    Args:
        kind: what it is, after the product's name.
        title: of the page.
        headline: the answer.
        sections: what it rests on.
        source: what it was made from.
    """
    return _render(
        "sections.html",
        kind=kind,
        title=title,
        headline=headline,
        sections=sections,
        source=source,
    )


def _render(template: str, **values: Any) -> str:
    jinja2 = _jinja2()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["code"] = _with_code
    return environment.get_template(template).render(
        **values,
        charts=_Charts(),
        css=_file("report.css"),
        script=_file("charts.js"),
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _with_code(text: str) -> Any:
    """A sentence as HTML, with what stands between backticks as code."""
    markup: Any = import_module("markupsafe")
    parts = [str(markup.escape(part)) for part in text.split("`")]
    if len(parts) % 2 == 0:  # a backtick of the run's own
        return markup.escape(text)
    shown = (f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    return markup.Markup("".join(shown))


def _baseline_among(runs: Sequence[RunRecords]) -> RunRecords | None:
    """The only run without a layer in low precision, if there is just one."""
    high = [run for run in runs if run.starts and run.steps and not low_precision(run)[0]]
    high = [run for run in high if run.statistics is None and not run.parity]
    return high[0] if len(runs) > 1 and len(high) == 1 else None


def _own_baseline(run: RunRecords) -> RunRecords | None:
    """The baseline that the run was told of, if it is still there."""
    for options in run.settings.values():
        place = options.get("baseline")
        if isinstance(place, str) and Path(place).is_dir():
            try:
                return read_records(place)
            except ValueError:
                continue
    return None


def _file(name: str) -> str:
    return (resources.files("lightning_fp.report") / "templates" / name).read_text(encoding="utf-8")


def _jinja2() -> Any:
    try:
        return import_module("jinja2")
    except ImportError as error:
        raise ImportError("a report needs jinja2: pip install jinja2") from error
