"""A pretraining loop of its own, in FP8: compiled blocks, accumulation, warm-up and cosine of the
learning rate, evaluation in high precision, a checkpoint to go on from. Lightning is not used.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.loop import PrecisionLoop


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        normed = F.rms_norm(x, (width,))
        q, k, v = self.qkv(normed).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.relu(self.up(F.rms_norm(x, (width,)))).square())


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.lm_head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(F.rms_norm(x, x.shape[-1:])).float()


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def rows_of(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - context - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


def rate(step: int, steps: int) -> float:
    """Warm-up over a tenth, cosine down to a tenth."""
    warm = max(steps // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    context, generator = 64, torch.Generator().manual_seed(0)
    model = GPT(layers=2, width=64, heads=4, context=context).to(device)
    if not options.no_compile:
        for block in model.blocks:  # block by block: one graph serves all of them
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, options.steps))
    loop = PrecisionLoop(
        model,
        optimizer,
        "delayed",
        layers={"blocks.*": "fp8-delayed"},
        scheduler=scheduler,
        clip_norm=1.0,
        max_steps=options.steps,
        dirpath=options.output,
    )
    print(loop.conversion)

    for step in range(options.steps):
        rows = rows_of(train, 8 * options.accumulate, context, generator).to(device)
        micro_batches = list(rows.chunk(options.accumulate))
        loss = loop.step(lambda micro: loss_of(model, micro), micro_batches)
        if (step + 1) % 20 == 0:
            with loop.evaluation():
                rows = rows_of(held_out, 32, context, torch.Generator().manual_seed(0)).to(device)
                print(f"step {step + 1:4}: {loss.item():.4f}, held out {loss_of(model, rows):.4f}")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "loop": loop.state_dict(),
        },
        options.output / "last.pt",
    )
    loop.close()
    print(loop.steps.sentence())
    print(f"More: lightning-fp report {loop.directory}")


if __name__ == "__main__":
    main()
