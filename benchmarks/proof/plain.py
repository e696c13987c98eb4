"""The same faults in a loop of one's own, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.proof.cases import Case
from benchmarks.proof.nets import BatchNormNet
from lightning_fp.demo.data import read_sources
from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.innocent import DataFault
from lightning_fp.demo.faults.run import TinyBatches, TinyByteGPT
from lightning_fp.layers import PrecisionMap
from lightning_fp.loop import PrecisionLoop


def runs_plainly(case: Case) -> bool:
    """Whether a case needs nothing of a Trainer: no callbacks but faults, no manual steps."""
    fault = case.make()
    known = fault is None or isinstance(fault, (Fault, DataFault))
    return known and case.net is not BatchNormNet and not case.options


def in_a_plain_loop(
    case: Case,
    seed: int,
    seen: Callable[[float, PrecisionMap], object],
    directory: Path,
    *,
    fallback: bool,
) -> int:
    """Train a case's net.

    Args:
        case: what may go wrong.
        seed: of weights and batches.
        seen: takes each step's loss, and the table of formats.
        directory: where the records of the run go.
        fallback: whether it is watched.

    Returns:
        Steps that were replayed.
    """
    fault = case.make()
    if fault is not None:
        fault.seed = seed
    model, loss, batches, steps = _parts(case, seed, fault)
    loop = PrecisionLoop(
        model,
        steps["optimizer"],
        case.scaling,
        layers={"*": case.scaling},
        base="32-true",
        scheduler=steps["scheduler"],
        clip_norm=steps["clip_norm"],
        fallback=fallback,
        monitor=False,
        dirpath=directory,
    )
    if isinstance(fault, Fault):
        fault.install(model, loop)
    for batch in batches:
        seen(float(loop.step(loss, batch)), loop.precision_map)
    loop.close()
    if isinstance(fault, Fault):
        fault.uninstall()
    return loop.steps.replayed


def _parts(
    case: Case, seed: int, fault: Any
) -> tuple[nn.Module, Callable[[Any], Tensor], Iterable[Any], dict[str, Any]]:
    if case.net is None:
        text, _ = read_sources()
        gpt, data = TinyByteGPT(2), fault if isinstance(fault, DataFault) else None
        made: Any = gpt.configure_optimizers()
        steps = {"optimizer": made["optimizer"], "scheduler": made["lr_scheduler"]["scheduler"]}
        batches = TinyBatches(text, batches=case.steps, seed=seed, fault=data)
        return gpt, gpt._loss, batches, {**steps, "clip_norm": 1.0}
    net = case.net(seed, case.rate)
    (optimizer,), (schedule,) = net.configure_optimizers()
    spoil = getattr(fault, "spoil", lambda batch, _: batch)
    rows = [spoil(batch, number) for number, batch in enumerate(net.batches(case.steps, seed))]
    steps = {"optimizer": optimizer, "scheduler": schedule["scheduler"], "clip_norm": None}
    return net, net.loss, rows, steps
