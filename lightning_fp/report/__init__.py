"""One offline HTML file, and a screenful of text, from what a run has left behind."""

from lightning_fp.report.page import write_report
from lightning_fp.report.read.cost import RunCost, run_cost
from lightning_fp.report.read.run_records import RunRecords, read_records
from lightning_fp.report.terminal import terminal_summary

__all__ = [
    "RunCost",
    "RunRecords",
    "read_records",
    "run_cost",
    "terminal_summary",
    "write_report",
]
