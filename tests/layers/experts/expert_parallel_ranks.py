"""Experts sharded over two real ranks by torch's own tools: test_expert_parallel.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lightning_fp import convert
from tests.experts import GroupedExperts
from tests.two_ranks import WORLD, one_of_two_ranks

EXPERTS, TOKENS = 4, 24


class ExpertParallel(ParallelStyle):
    """As torchtitan's: tokens go to the ranks of their experts, and what comes out goes back."""

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(sharded))

    def _dispatch(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x, counts = inputs
        theirs = torch.empty_like(counts)
        torch.distributed.all_to_all_single(theirs, counts, group=mesh.get_group())
        self.sent = counts.view(WORLD, -1).sum(1).tolist()
        per_source = theirs.view(WORLD, -1)
        self.got = per_source.sum(1).tolist()
        arrived = all_to_all_single_autograd(x, self.got, self.sent, mesh.get_group())
        # They come by source; experts want them by expert.
        ids = torch.arange(per_source.shape[1]).repeat(WORLD)
        ids = torch.repeat_interleave(ids, per_source.flatten())
        self.order = torch.argsort(ids, stable=True)
        return torch.as_tensor(arrived)[self.order], per_source.sum(0)

    def _combine(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        back = torch.empty_like(output)
        back = back.index_copy(0, self.order, output)
        return all_to_all_single_autograd(back, self.sent, self.got, mesh.get_group())

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            partial(self._partition),
            input_fn=self._dispatch,  # pyright: ignore[reportArgumentType]
            output_fn=self._combine,  # pyright: ignore[reportArgumentType]
        )


def model() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": GroupedExperts(EXPERTS)}).train()


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    """A rank's own tokens, sorted by expert, and how many of each; one expert sees none at all."""
    generator = torch.Generator().manual_seed(rank)
    counts = torch.tensor([[7, 0, 12, 5], [3, 0, 1, 20]][rank])
    return torch.randn(TOKENS, 32, generator=generator), counts


def together(x: list[Tensor], counts: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All ranks' tokens, sorted by expert, and where each rank's stand."""
    ids = torch.cat([torch.repeat_interleave(torch.arange(EXPERTS), each) for each in counts])
    order = torch.argsort(ids, stable=True)
    place = torch.argsort(order)
    return torch.cat(x)[order], torch.stack(counts).sum(0), list(place.split(TOKENS))


def run(mesh: DeviceMesh, rank: int, format: str) -> dict[str, Tensor]:
    sharded, whole = model(), model()
    parallelize_module(sharded["experts"], mesh, ExpertParallel())
    both = []
    for each in (sharded, whole):
        table = convert(each, format, layers={"experts": format}).precision_map
        table.set("experts[2]", "bf16")  # of the second rank
        table.apply()
        both.append(each["experts"])
    x, counts = tokens(rank)
    found = both[0](x, counts)
    found.square().sum().backward()
    every = [tokens(each) for each in range(WORLD)]
    all_x, all_counts, places = together([x for x, _ in every], [c for _, c in every])
    expected = both[1](all_x, all_counts)
    expected.square().sum().backward()
    told = {"output": found, "output of one process": expected[places[rank]]}
    for name, parameter in both[0].named_parameters():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        told[name] = gradient.full_tensor()
        told[f"{name} of one process"] = both[1].get_parameter(name).grad
    return {name: value.detach().clone() for name, value in told.items()}


def main(directory: Path, formats: list[str]) -> None:
    with one_of_two_ranks(directory) as rank:
        mesh = init_device_mesh("cpu", (WORLD,))
        told = {format: run(mesh, rank, format) for format in formats}
        torch.save(told, directory / f"rank{rank}.pt")
