"""A mixture of experts in FP8: each of two processes has half of the weights, by FSDP2.

    torchrun --nproc-per-node 2 examples/moe.py

On a machine with GPUs each process takes one, else both share the CPU. On a single process,
`python examples/moe.py`, nothing is sharded.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_fp import convert

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)  # the same on all processes
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        experts_implementation="grouped_mm",
    )
    return MixtralForCausalLM(config)


def say(*text: object) -> None:
    if RANK == 0:
        print(*text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps

    device = torch.device("cuda", RANK) if torch.cuda.is_available() else torch.device("cpu")
    model = tiny_mixtral().to(device).train()
    text = torch.tensor(list((__doc__ or "").encode()), device=device)
    example = {"input_ids": text[:64].unsqueeze(0)}
    # Named, because experts as small as these would gain nothing on FP8 hardware.
    report = convert(
        model, "fp8-rowwise", layers={"*.experts": "fp8-rowwise"}, example_input=example
    )
    say(report)

    if RANKS > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    table, optimizer = report.precision_map, torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(RANK)  # other text on each process
    first = last = float("nan")
    for step in range(steps):
        starts = torch.randint(len(text) - 64, (4,), generator=generator).tolist()
        batch = torch.stack([text[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        first = last if step == 0 else first
        if step == steps // 2:  # the same on all processes, at the boundary of a step
            table.set("*.layers.0.mlp.experts", "bf16", reason="one layer's experts")
            table.set("*.layers.1.mlp.experts[3]", "bf16", reason="one expert")
        table.step()

    for name, format in table.formats().items():
        if "experts" in name:
            say(f"{name}: {format}")
    say(f"loss {first:.2f} -> {last:.2f}")
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
