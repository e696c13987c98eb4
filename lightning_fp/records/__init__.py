"""What a run leaves behind: tables that are readable while it runs and after it was killed."""

from lightning_fp.records.rows import Sampled, StatisticsRows, statistics_rows
from lightning_fp.records.tables import StatisticsWriter, read_statistics

__all__ = [
    # reading
    "read_statistics",
    # writing
    "Sampled",
    "StatisticsRows",
    "StatisticsWriter",
    "statistics_rows",
]
