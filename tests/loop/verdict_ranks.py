"""A fault on two real ranks, in the Trainer, a plain loop and Fabric, for test_verdict_ranks.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_fp import PrecisionFallback
from lightning_fp.demo.data import read_sources
from lightning_fp.demo.faults import fault_plugin
from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.innocent import Batch, DataFault
from lightning_fp.demo.faults.run import TinyBatches, TinyByteGPT
from lightning_fp.loop import PrecisionLoop
from tests.loop.faulty import SHORT, STEPS, loss_of, told, watch

LOOPS = ("trainer", "plain", "fabric")


class Half(TinyBatches):
    """Of each batch the rows of this rank."""

    def _batch(self, number: int) -> Batch:
        rank = dist.get_rank()
        inputs, targets, weights = super()._batch(number)
        rows = slice(4 * rank, 4 * rank + 4)
        return inputs[rows], targets[rows], weights[rows]


def shard(model: TinyByteGPT, mesh: DeviceMesh | None = None) -> TinyByteGPT:
    """FSDP2, each block by itself."""
    if isinstance(model, FSDPModule):
        return model
    options: dict[str, Any] = {} if mesh is None else {"mesh": mesh}
    for block in model.blocks:  # pyright: ignore
        fully_shard(block, **options)
    return fully_shard(model, **options)  # pyright: ignore


class Sharded(TinyByteGPT):
    def configure_model(self) -> None:
        shard(self, self.device_mesh["data_parallel"])  # pyright: ignore


def data(fault: Fault | DataFault) -> Half:
    text, _ = read_sources()
    spoiled = fault if isinstance(fault, DataFault) else None
    return Half(text, batches=STEPS, seed=0, fault=spoiled)


def in_the_trainer(fault: Any, scaling: str, kind: str, directory: Path) -> Any:
    model = (Sharded if kind == "fsdp" else TinyByteGPT)(1)
    fallback = PrecisionFallback(dirpath=directory, **watch())
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharded if kind == "fsdp" else DDPStrategy(),
        use_distributed_sampler=False,
        max_epochs=1,
        plugins=fault_plugin(scaling),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[*([fault] if isinstance(fault, Fault) else []), fallback],
    )
    trainer.fit(model, data(fault))
    plugin: Any = trainer.precision_plugin
    return model, plugin.precision_map.formats()


def parts(kind: str, own: str) -> tuple[TinyByteGPT, Any, Any, Any, Any]:
    """Model, what is called, optimizer, scheduler, Fabric."""
    model = TinyByteGPT(1)
    fabric: Any = None
    if own == "plain":
        module = shard(model) if kind == "fsdp" else DistributedDataParallel(model)
    else:
        sharded = FabricModelParallel(shard_mesh, data_parallel_size=2, tensor_parallel_size=1)
        strategy = FabricDDP() if kind == "ddp" else sharded
        fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        module = fabric.setup_module(model)
    configured: Any = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    if fabric is not None:
        optimizer = fabric.setup_optimizers(optimizer)
    return model, module, optimizer, scheduler, fabric


def shard_mesh(model: Any, mesh: DeviceMesh) -> Any:
    return shard(model, mesh["data_parallel"])


def in_own_loop(fault: Any, scaling: str, kind: str, own: str, directory: Path) -> Any:
    model, module, optimizer, scheduler, fabric = parts(kind, own)
    loop = PrecisionLoop(
        module,
        optimizer,
        scaling,
        layers={"*": scaling},
        base="32-true",
        scheduler=scheduler,
        clip_norm=1.0,
        fallback=watch(),
        monitor=False,
        dirpath=directory,
        fabric=fabric,
    )
    if isinstance(fault, Fault):
        fault.install(model, loop)
    compute_loss: Callable[[Batch], Tensor] = loss_of(module)
    for batch in data(fault):
        loop.step(compute_loss, batch)
    loop.close()
    if isinstance(fault, Fault):
        fault.uninstall()
    return model, loop.precision_map.formats()


def whole(model: nn.Module) -> list[Tensor]:
    weights: list[Any] = list(model.parameters())
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in weights]


def main(directory: Path, case: str, kind: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300),
    )
    scaling, make = SHORT[case]
    found: dict[str, Any] = {}
    for name in LOOPS:
        L.seed_everything(0, verbose=False)
        fault: Any = make()
        where = directory / name
        if name == "trainer":
            model, formats = in_the_trainer(fault, scaling, kind, where)
        else:
            model, formats = in_own_loop(fault, scaling, kind, name, where)
        found[name] = {
            "weights": whole(model),
            "formats": formats,
            "told": told(where) if rank == 0 else [],
        }
    torch.save(found, directory / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
