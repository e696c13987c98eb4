"""What a run leaves behind: tables and events, readable while it runs and after it was killed."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.records.baseline import Baseline, read_baseline
    from lightning_fp.records.evaluation import EvaluationRow, EvaluationWriter, read_evaluation
    from lightning_fp.records.events import (
        Demotion,
        Event,
        EventWriter,
        FormatChange,
        GateResult,
        LayerClimb,
        Note,
        OtherEvent,
        Promotion,
        Replayed,
        Resumed,
        Rollback,
        SkippedStep,
        StageChange,
        Started,
        StateChange,
        Suspicion,
        UnprovenClimb,
        Verdict,
        read_events,
    )
    from lightning_fp.records.loss import (
        Loss,
        LossRow,
        LossWriter,
        read_loss,
        read_steps,
        write_loss,
    )
    from lightning_fp.records.mismatch_rows import (
        MismatchWriter,
        read_mismatch,
        read_mismatch_causes,
    )
    from lightning_fp.records.parity import read_parity
    from lightning_fp.records.rows import Sampled, StatisticsRows, statistics_rows
    from lightning_fp.records.run import LayerInfo, RunInfo, read_run, write_run
    from lightning_fp.records.stability import StabilityWriter, read_stability
    from lightning_fp.records.tables import StatisticsWriter, read_statistics
    from lightning_fp.records.te_inspect import InspectRecords
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # reading
    "Baseline",
    "Loss",
    "read_baseline",
    "read_evaluation",
    "read_events",
    "read_loss",
    "read_mismatch",
    "read_mismatch_causes",
    "read_parity",
    "read_run",
    "read_stability",
    "read_statistics",
    "read_steps",
    # events
    "Demotion",
    "Event",
    "FormatChange",
    "GateResult",
    "LayerClimb",
    "Note",
    "OtherEvent",
    "Promotion",
    "Replayed",
    "Resumed",
    "Rollback",
    "SkippedStep",
    "StageChange",
    "Started",
    "StateChange",
    "Suspicion",
    "UnprovenClimb",
    "Verdict",
    # the run
    "LayerInfo",
    "RunInfo",
    # writing
    "InspectRecords",
    "EvaluationRow",
    "EvaluationWriter",
    "EventWriter",
    "LossRow",
    "LossWriter",
    "MismatchWriter",
    "Sampled",
    "StabilityWriter",
    "StatisticsRows",
    "StatisticsWriter",
    "statistics_rows",
    "write_loss",
    "write_run",
]
