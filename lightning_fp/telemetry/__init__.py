"""What is measured per step, and the board it is published on."""

from lightning_fp.telemetry.board import Board, Follower, Measurement
from lightning_fp.telemetry.run_telemetry import LOSS, RunTelemetry
from lightning_fp.telemetry.signal_feed import SignalFeed, SignalReader
from lightning_fp.telemetry.step_curve import StepCurve
from lightning_fp.telemetry.step_record import OptimizerStep, StepRecord, StepRecorder

__all__ = [
    # a run
    "LOSS",
    "RunTelemetry",
    # steps
    "OptimizerStep",
    "StepCurve",
    "StepRecord",
    "StepRecorder",
    # over all ranks, on the host
    "SignalFeed",
    "SignalReader",
    # measurements
    "Board",
    "Follower",
    "Measurement",
]
