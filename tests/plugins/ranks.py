"""What two real ranks with gloo run, for test_distributed.py."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_fp import FP8Precision, PrecisionMap, convert, revert
from lightning_fp.layers import FPLinear
from tests.helper import LanguageModel, make_trainer, text_loader

ROOT = Path(__file__).parents[2]
WORLD = 2
DONE = "all scenarios ran"
WALK = ("bf16", "fp8-rowwise", "fp8-dynamic", "e8m3", "fp8-rowwise-gw-hp", "high")
COMPILED_STEPS = 4  # each costs a recompilation


def read_ranks(directory: Path) -> list[dict[str, Any]]:
    """Each rank's results by scenario.

    Raises:
        RuntimeError: with the end of a rank's log, if it did not get to the end.
    """
    for rank in range(WORLD):
        log = (directory / f"log{rank}").read_text()
        if not log.rstrip().endswith(DONE):
            raise RuntimeError(f"rank {rank} did not finish:\n{log[-4000:]}")
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(WORLD)]


# -- what the ranks run --------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TwoLinears() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [full(parameter) for parameter in model.parameters()]


def flip(
    model: nn.Module, wrapped: Callable[[Tensor], Tensor], table: PrecisionMap, how: str
) -> dict[str, Any]:
    """Train with a change of format before every step; every rank has data of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parameters = list(model.parameters())
    moments: list[int] = []
    losses, formats, same = [], [], True
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    for index, format in enumerate(WALK if how == "eager" else WALK[:COMPILED_STEPS]):
        table.set("blocks.1.*" if index % 2 else "*.up", format)
        table.apply()
        formats.append(table.formats())
        loss = (wrapped(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        now = [id(optimizer.state[p]["exp_avg"]) for p in parameters]
        moments = moments or now
        same &= all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        same &= now == moments
        same &= all(optimizer.state[p]["step"] == index + 1 for p in parameters)
    return {"losses": losses, "formats": formats, "same": same, "weights": weights(model)}


def compile_it(model: nn.Module, how: str) -> nn.Module:
    if how == "regional":
        for block in model.blocks:  # pyright: ignore
            block.compile(backend="eager")
    if how == "whole":
        return torch.compile(model, backend="eager")  # pyright: ignore
    return model


def ddp(how: str = "eager") -> dict[str, Any]:
    model = Blocks()
    table = convert(model).precision_map
    wrapped = nn.parallel.DistributedDataParallel(compile_it(model, how))
    return flip(model, wrapped, table, how)


def shard(model: Blocks, policy: MixedPrecisionPolicy) -> None:
    # one linear by itself, one block with the rest, and the root
    fully_shard(model.blocks[0].down, mp_policy=policy)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def fsdp2(how: str = "eager", *, before: bool = False, bf16: bool = False) -> dict[str, Any]:
    model = Blocks()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
    if before:
        table = convert(model).precision_map
        shard(model, policy)
    else:
        shard(model, policy)
        table = convert(model).precision_map
    sharded, inside = model.blocks[0].down, model.blocks[0].up
    converted = isinstance(sharded, FSDPModule) and isinstance(sharded, FPLinear)
    converted &= type(inside) is FPLinear
    keys = list(model.state_dict())
    again = convert(model).precision_map  # idempotent, also on what is sharded
    found = again.formats() == table.formats()
    table = again
    results = flip(model, compile_it(model, how), table, how)
    found &= revert(model) == 4
    reverted = isinstance(sharded, FSDPModule) and not isinstance(sharded, FPLinear)
    reverted &= isinstance(sharded, nn.Linear) and type(inside) is nn.Linear
    model(torch.randn(8, 16)).sum().backward()  # still sharded, still trains
    sharded.unshard()
    sharded.reshard()
    return {
        **results,
        "converted": converted and found,
        "reverted": reverted,
        "keys": keys == list(Blocks().state_dict()),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
    }


class FlipInTrainer(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        pattern = f"*.blocks.{step % 2}.*" if step % 3 else "*.fc1"
        trainer.precision_plugin.precision_map.set(pattern, WALK[step % len(WALK)])


def ddp_trainer() -> dict[str, Any]:
    plugin, model = FP8Precision(), LanguageModel()
    trainer = make_trainer(
        plugin, max_steps=8, devices=WORLD, strategy=DDPStrategy(), callbacks=[FlipInTrainer()]
    )
    before = [id(p) for p in model.parameters()]
    trainer.fit(model, text_loader(80))
    same = before == [id(p) for p in model.parameters()]
    return {
        "losses": model.losses,
        "formats": [plugin.precision_map.formats()],
        "same": same,
        "weights": weights(model),
        "world": trainer.world_size,
    }


class Sharded(LanguageModel):
    """Shards itself as ModelParallelStrategy asks; `inside` converts before it does."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.inside = inside

    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):
            return
        if self.inside:
            convert(self.model)
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.model.blocks[0].fc1, mesh=mesh)
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def fsdp2_trainer(directory: Path, *, inside: bool = False) -> dict[str, Any]:
    """A whole run, and one that is saved in the middle and resumed."""
    path = directory / f"inside{inside}.ckpt"

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    def run(ckpt: Path | None, *callbacks: L.Callback) -> tuple[Sharded, FP8Precision]:
        plugin, model = FP8Precision(base="32-true"), Sharded(inside)
        strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
        trainer = make_trainer(
            plugin,
            max_epochs=2,
            devices=WORLD,
            strategy=strategy,
            callbacks=[FlipInTrainer(), *callbacks],
        )
        trainer.fit(model, text_loader(32), ckpt_path=ckpt)
        return model, plugin

    model, plugin = run(None, Save())
    resumed, resumed_plugin = run(path)
    fc1 = model.model.blocks[0].fc1
    return {
        "losses": model.losses,
        "formats": [plugin.precision_map.formats()],
        "same": isinstance(fc1, FSDPModule) and isinstance(fc1, FPLinear),
        "weights": weights(model),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "resumed": resumed.losses == model.losses[len(model.losses) // 2 :],
        "resumed formats": resumed_plugin.precision_map.formats(),
        "resumed weights": weights(resumed),
    }


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ddp": lambda _: ddp(),
    "ddp regional": lambda _: ddp("regional"),
    "ddp whole": lambda _: ddp("whole"),
    "ddp trainer": lambda _: ddp_trainer(),
    "fsdp2 convert after": lambda _: fsdp2(),
    "fsdp2 convert before": lambda _: fsdp2(before=True),
    "fsdp2 bf16 after": lambda _: fsdp2(bf16=True),
    "fsdp2 bf16 before": lambda _: fsdp2(bf16=True, before=True),
    "fsdp2 regional": lambda _: fsdp2("regional"),
    "fsdp2 whole": lambda _: fsdp2("whole"),
    "fsdp2 trainer": fsdp2_trainer,
    "fsdp2 trainer inside": lambda directory: fsdp2_trainer(directory, inside=True),
}


def main(directory: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=int(os.environ["RANK"]),
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for name in scenarios:
        start = time.monotonic()
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            results[name] = SCENARIOS[name](directory)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        torch.save(results, directory / f"rank{dist.get_rank()}.pt")
        print(f"{time.monotonic() - start:.1f} s: {name}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    print(DONE, flush=True)
