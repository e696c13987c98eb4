"""Faults to inject into a run: precision faults, which only FP8 suffers from, and others.

What a fault is good for: to see whether the one kind is recognised and healed, and the other not
mistaken for it. All are Lightning callbacks, deterministic from a seed, and begin after a step.
"""

from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.cases import CASES, FaultCase
from lightning_fp.demo.faults.corruption import BackwardCorruption, ForwardCorruption
from lightning_fp.demo.faults.innocent import DataFault, LearningRateJump, NaNData, ShuffledLabels
from lightning_fp.demo.faults.run import FaultRun, fault_plugin, fault_run
from lightning_fp.demo.faults.scaling import ActivationOutliers, GradientBursts, StuckScale
from lightning_fp.demo.faults.trial import Trial, trial

__all__ = [
    "Fault",
    # harm by scaling: high precision does not notice them
    "ActivationOutliers",
    "GradientBursts",
    "StuckScale",
    # harm by what a low-precision product might do, whatever the reason
    "BackwardCorruption",
    "ForwardCorruption",
    # not a matter of precision
    "DataFault",
    "LearningRateJump",
    "NaNData",
    "ShuffledLabels",
    # runs with and without them
    "CASES",
    "FaultCase",
    "FaultRun",
    "fault_plugin",
    "fault_run",
    # what protects a run, tried
    "Trial",
    "trial",
]
