"""What each rank runs of the matrix of strategies: one cell after the other."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_fp import ClampMonitor, PrecisionFallback, half_policy, precision_plugin
from tests.helper import LanguageModel, make_trainer, text_loader
from tests.strategies.cells import Cell
from tests.two_ranks import one_of_two_ranks

WIDTH = 32
STEPS = 4
BATCH = 4
COMPILER = "aot_eager"
"""All of torch.compile but the code it generates, which would take minutes of each cell."""

SECONDS = 120
"""For which a rank waits for the others."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class NextByte(nn.Module):
    """From a byte to the next: as small as a model of blocks can be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Parallel(LanguageModel):
    """The model as a cell asks for it; all ranks have the same batches."""

    def __init__(self, cell: Cell) -> None:
        torch.manual_seed(0)
        super().__init__(NextByte())
        self.cell, self.configured = cell, False

    def configure_model(self) -> None:
        if self.configured:
            return
        self.configured = True
        blocks: Any = self.model.blocks
        cell = self.cell
        policy = half_policy() if cell.base == "16-true" else MixedPrecisionPolicy()
        whole, parts = self._meshes()
        for index, block in enumerate(blocks):
            if parts is not None:
                plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, parts, plan)
            if cell.checkpointing:
                blocks[index] = block = checkpoint_wrapper(block)
            if cell.compiled == "blocks":
                block.compile(backend=COMPILER)
            if whole is not None:
                fully_shard(block, mesh=whole, mp_policy=policy)
        if whole is not None:
            fully_shard(self.model, mesh=whole, mp_policy=policy)
        if cell.compiled == "model":
            self.model.compile(backend=COMPILER)

    def _meshes(self) -> tuple[DeviceMesh | None, DeviceMesh | None]:
        """The ranks that share all weights, and those that share each layer."""
        mesh: Any = self.device_mesh
        match self.cell.strategy:
            case "FSDP2":
                return mesh["data_parallel"], None
            case "HSDP":
                names = "copies", "shards"
                return init_device_mesh("cpu", _by_two(), mesh_dim_names=names), None
            case "tensor parallel":
                return None, mesh["tensor_parallel"]
            case "FSDP2 x tensor parallel":
                return mesh["data_parallel"], mesh["tensor_parallel"]
            case _:
                return None, None


def _by_two() -> tuple[int, int]:
    return dist.get_world_size() // 2, 2


def strategy_of(cell: Cell) -> Strategy | str:
    """Lightning's strategy for a cell."""
    match cell.strategy:
        case "":
            return "auto"
        case "DDP":
            return DDPStrategy()
        case "tensor parallel" | "FSDP2 x tensor parallel":
            data, parts = _by_two()
            return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=parts)
        case _:
            world = dist.get_world_size()
            return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)


def watches(cell: Cell, directory: Path) -> list[L.Callback]:
    """The callbacks of a cell; of few steps they have to see something."""
    match cell.watched_by:
        case "ClampMonitor":
            return [ClampMonitor(every_n_steps=2, log_every_n_steps=2, dirpath=directory)]
        case "PrecisionFallback":
            return [PrecisionFallback(snapshot_every_n_steps=2, dirpath=directory)]
        case _:
            return []


def train(cell: Cell, directory: Path) -> dict[str, Any]:
    """A few steps of a cell, or why there were none.

    Returns:
        losses of all steps, and "same": what has to be the same on all ranks. Or "refused", the
        message of an error at setup. Or "failed", a traceback.
    """
    torch._dynamo.reset()
    model = Parallel(cell)
    begin = time.monotonic()
    try:
        plugin = precision_plugin(cell.format, base=cell.base)
        callbacks = watches(cell, directory)
        trainer = make_trainer(
            plugin,
            max_steps=STEPS,
            devices=dist.get_world_size() if cell.strategy else 1,
            strategy=strategy_of(cell),
            callbacks=callbacks,
            default_root_dir=directory,
            use_distributed_sampler=False,
        )
        trainer.fit(model, text_loader(BATCH * STEPS))
        return {
            "losses": model.losses,
            "same": (model.losses, plugin.precision_map.formats(), digest(model)),
            "watch": {k: v for each in callbacks for k, v in seen(each).items()},
            "seconds": time.monotonic() - begin,
        }
    except ValueError as error:
        if not model.losses:
            return {"refused": str(error)}
        return {"failed": traceback.format_exc()}
    except Exception:
        return {"failed": traceback.format_exc()}


def seen(callback: L.Callback) -> dict[str, Any]:
    """What a callback has to tell of its run."""
    if isinstance(callback, ClampMonitor):
        return {"statistics": repr(callback.latest and callback.latest.columns(0))}
    assert isinstance(callback, PrecisionFallback)
    supervisor = callback.supervisor
    if supervisor is None:  # with all layers in high precision there is nothing to watch
        return {}
    rehearsed = (supervisor.state_dict()["rehearsal"] or {"reach": "none"})["reach"]
    return {"failed_at": supervisor.failed_at, "rehearsal": rehearsed}


def digest(model: nn.Module) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found.update(_bytes(whole))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def quiet() -> None:
    """What hundreds of Trainers have to say about a CPU is said once at most."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fp"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)


def main(directory: Path, cells: Sequence[Cell]) -> None:
    quiet()
    with one_of_two_ranks(directory, seconds=SECONDS) as rank:
        told: list[list[dict[str, Any]]] = []
        for cell in cells:
            at = directory / "run"
            found = train(cell, at)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            told.append(everyone)
            print(f"{found.get('seconds', 0):.1f} s: {cell}: {sorted(found)}", flush=True)
            if rank == 0:
                shutil.rmtree(at, ignore_errors=True)
            dist.barrier()
        if rank == 0:
            torch.save(told, directory / "told.pt")
