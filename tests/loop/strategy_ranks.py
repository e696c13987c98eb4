"""One model under every strategy on real ranks with gloo: test_strategies.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp import DivergenceDetector
from lightning_fp.loop import PrecisionLoop
from lightning_fp.stepping.gradients import clip_by_norm, gradient_norm
from tests.helper import TinyGPT, next_byte_loss, text_rows
from tests.loop.faulty import told
from tests.two_ranks import one_of_two_ranks

BATCH = 4
FAULT = 24
"""The step from which on one rank's layer is wrong in low precision."""

LONG, SAVED = 30, 12
FIRST_SAMPLED = 1
"""Seed by which of three steps the first is sampled."""

ROLLOUT = """
name: late
stages:
  - name: high
    layers: {"*": high}
    until: {steps: 6}
  - name: low
    layers: {"*": configured}
"""
FAULTY, FLIPPED = "blocks.0.fc1", "blocks.0.fc2"


# -- strategies ----------------------------------------------------------------------------------


def ddp(model: TinyGPT) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: TinyGPT) -> nn.Module:
    return _sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def hsdp(model: TinyGPT) -> nn.Module:
    """Copies of the model, each sharded over two ranks."""
    shape = dist.get_world_size() // 2, 2
    return _sharded(model, init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")))


def tensor_parallel(model: TinyGPT) -> nn.Module:
    return _split(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def sequence_parallel(model: TinyGPT) -> nn.Module:
    """As `tensor_parallel`, and between layers each rank has a part of each text."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = Shard(1)
    plan: dict[str, ParallelStyle] = {
        "norm": SequenceParallel(),
        "qkv": ColwiseParallel(input_layouts=split, output_layouts=Replicate()),
        "proj": RowwiseParallel(input_layouts=Replicate(), output_layouts=split),
        "fc1": ColwiseParallel(input_layouts=split),
        "fc2": RowwiseParallel(output_layouts=split),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    ends: dict[str, ParallelStyle] = {
        "blocks.0": _laid_out(Replicate(), split),
        "lm_head": _laid_out(split, Replicate()),
    }
    return parallelize_module(model, mesh, ends)


def _laid_out(before: Placement, after: Placement) -> PrepareModuleInput:
    return PrepareModuleInput(
        input_layouts=before, desired_input_layouts=after, use_local_output=True
    )


def two_dimensions(model: TinyGPT) -> nn.Module:
    """Layers over two ranks, and those shards sharded over the others."""
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "parts")
    )
    return _sharded(_split(model, mesh["parts"]), mesh["data"])


def _sharded(model: TinyGPT, mesh: DeviceMesh) -> TinyGPT:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _split(model: TinyGPT, mesh: DeviceMesh) -> TinyGPT:
    for block in model.blocks:
        parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


STRATEGIES: dict[str, Callable[[TinyGPT], nn.Module]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "two dimensions": two_dimensions,
}


def build(strategy: str, blocks: int) -> tuple[TinyGPT, nn.Module]:
    """A model, alike on all ranks and alone, and it in its wrappers."""
    torch.manual_seed(0)
    model = TinyGPT(blocks=blocks)
    return model, STRATEGIES[strategy](model) if dist.is_initialized() else model


# -- what is told --------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts them; of DTensors those that they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name: str = func.__name__
        made = func.namespace in ("c10d", "_c10d_functional") and "wait" not in name
        self.counts[name] += made and "wrap_tensor" not in name
        return func(*args, **(kwargs or {}))


def plain_steps(strategy: str, blocks: int, steps: int) -> list[int]:
    """How many collectives the strategy itself makes in each step."""
    _, model = build(strategy, blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counts: list[int] = []
    for batch in batches(steps):
        with Collectives() as counted:
            optimizer.zero_grad()
            next_byte_loss(model, batch).backward()
            if (norm := clip_norm(blocks)) is not None:
                clip_by_norm(optimizer, norm)
            else:
                gradient_norm(optimizer)  # who does not clip looks whether they are finite
            optimizer.step()
        counts.append(counted.counts.total())
    return counts


def clip_norm(blocks: int) -> float | None:
    """Clipped by the norm of all shards, sums of which have another order than one process's."""
    return 1.0 if blocks > 1 else None


def batches(steps: int) -> Iterator[Tensor]:
    """The same on all ranks: so one process trains on as much."""
    yield from text_rows(BATCH * steps).split(BATCH)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how long."""

    scaling: str = "fp8-delayed"
    blocks: int = 1
    steps: int = 3
    long: bool = False
    """Whether formats are rolled out, a rank is faulty, and a checkpoint is written."""

    optimizer: str = "AdamW"
    accumulate: int = 1


def make(strategy: str, run: Run, directory: Path) -> tuple[TinyGPT, PrecisionLoop]:
    """A model, and the loop that trains and watches it."""
    model, wrapped = build(strategy, run.blocks)
    optimizer: Any = getattr(torch.optim, run.optimizer)
    options: dict[str, Any] = {"momentum": 0.9} if run.optimizer == "SGD" else {}
    loop = PrecisionLoop(
        wrapped,
        optimizer(model.parameters(), lr=1e-3, **options),
        run.scaling,
        base="32-true",
        clip_norm=clip_norm(run.blocks),
        monitor={"every_n_steps": 3, "log_every_n_steps": 3, "seed": FIRST_SAMPLED},
        fallback={
            "detector": DivergenceDetector(armed=16),
            "snapshot_every_n_steps": 4,
            "probe_every_n_steps": 4,
        },
        recipe=ROLLOUT if run.long else None,
        dirpath=directory,
    )
    if run.long:
        _spoil(model, loop)
    return model, loop


def train(strategy: str, run: Run, directory: Path) -> dict[str, Any]:
    """A watched run, and what every step of it showed; its second half again, from a checkpoint."""
    model, loop = make(strategy, run, directory)
    checkpoint = directory / "checkpoint" if run.long else None
    found = steps(loop, run, checkpoint)
    found |= {
        "weights": {name: whole(each) for name, each in model.named_parameters()},
        "told": told(directory) if not dist.is_initialized() or dist.get_rank() == 0 else [],
        "phase": loop.phase,
    }
    if checkpoint is not None:
        model, loop = make(strategy, run, directory / "resumed")
        load(loop, checkpoint)
        found["resumed"] = steps(loop, run, None)["losses"]
    return found


def steps(loop: PrecisionLoop, run: Run, checkpoint: Path | None) -> dict[str, Any]:
    """The rest of a run."""
    found: dict[str, Any] = {"collectives": [], "losses": [], "tables": []}
    for batch in list(batches(run.steps))[loop.global_step :]:
        micro_batches: Any = list(batch.chunk(run.accumulate)) if run.accumulate > 1 else batch
        with Collectives() as counted:
            loss = loop.step(lambda rows: next_byte_loss(loop.model, rows), micro_batches)
        found["collectives"].append(counted.counts.total())
        found["losses"].append(float(loss))
        found["tables"].append(_tables(loop))
        if loop.global_step == (SAVED if run.long else 2):
            loop.precision_map.set(f"*{FLIPPED}", "fp8-rowwise")
            if checkpoint is not None:
                save(loop, checkpoint)
    with loop.evaluation():
        found["evaluated"] = float(next_byte_loss(loop.model, next(batches(1))))
    loop.close()
    return found


def save(loop: PrecisionLoop, directory: Path) -> None:
    """Shards by torch's distributed checkpoint, what this package adds beside them."""
    model, optimizer = get_state_dict(loop.model, loop.optimizers)
    save_shards({"model": model, "optimizer": optimizer}, checkpoint_id=directory)
    if dist.get_rank() == 0:
        torch.save(loop.state_dict(), directory / "loop.pt")
    dist.barrier()


def load(loop: PrecisionLoop, directory: Path) -> None:
    """See `save`."""
    model, optimizer = get_state_dict(loop.model, loop.optimizers)
    state = {"model": model, "optimizer": optimizer}
    load_shards(state, checkpoint_id=directory)
    set_state_dict(
        loop.model,
        loop.optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    loop.load_state_dict(torch.load(directory / "loop.pt", weights_only=True))


def _tables(loop: PrecisionLoop) -> dict[str, Any]:
    """What must be the same on all ranks after each step."""
    history, casts = loop.precision_map.scale_history, loop._parts.casts
    scales = history.in_force()
    return {
        "formats": loop.precision_map.formats(),
        "amax": history.amax.clone(),
        "scales": torch.zeros(0) if scales is None else scales.values.clone(),
        "statistics": ""
        if casts is None or casts.latest is None
        else repr(casts.latest.columns(0)),
    }


def _spoil(model: TinyGPT, loop: PrecisionLoop) -> None:
    """From a step on one rank's part of a layer is not finite in low precision."""
    layer: Any = model.get_submodule(FAULTY)

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        low = not layer.format.is_high_precision and layer.training
        return output * torch.nan if low and loop.global_step >= FAULT else output

    if not dist.is_initialized() or dist.get_rank() == 1:
        layer.register_forward_hook(spoil)


def whole(parameter: Tensor) -> Tensor:
    found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return found.detach().clone()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(run: Run, directory: Path) -> dict[str, Any]:
    """A run of one process, with the ranks' one thread."""
    with _one_thread():
        return train("", run, directory)


def main(directory: Path, runs: dict[str, tuple[str, Run]]) -> None:
    with one_of_two_ranks(directory, seconds=120) as rank:
        found: dict[str, Any] = {}
        for name, (strategy, run) in runs.items():
            found[name] = train(strategy, run, directory / name)
            if not run.long:
                found[name]["plain"] = plain_steps(strategy, run.blocks, run.steps)
        torch.save(found, directory / f"rank{rank}.pt")
