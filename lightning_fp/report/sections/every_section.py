"""The sections of one run: what is asked, what was recorded, and what to do where nothing was."""

from __future__ import annotations

from lightning_fp.report.draw.parts import Section
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.casts import (
    advice_section,
    casts_section,
    gradients_section,
    parity_section,
)
from lightning_fp.report.sections.over_time import (
    events_section,
    formats_section,
    loss_section,
    stages_section,
)
from lightning_fp.report.sections.spent import (
    cost_section,
    evaluation_section,
    mismatch_section,
    settings_section,
)
from lightning_fp.report.sections.worst import worst_section


def sections(records: RunRecords, cost: RunCost) -> list[Section]:
    """All sections of a run's report; one without records says how to get them."""
    return [
        loss_section(records),
        events_section(records),
        formats_section(records),
        stages_section(records),
        casts_section(records),
        worst_section(records),
        *([gradients_section(records)] if records.gradients else []),
        parity_section(records),
        advice_section(records),
        evaluation_section(records),
        mismatch_section(records),
        cost_section(records, cost),
        settings_section(records),
    ]
