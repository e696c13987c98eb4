"""A Llama-like decoder in plain PyTorch, and its training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.card import Card

if TYPE_CHECKING:
    from lightning_fp import PrecisionMap


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of Llama 3.2 1B, with a vocabulary of 32,000."""

    layers: int = 16
    width: int = 2048
    hidden: int = 8192
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 32000
    context: int = 2048


SMALL = Shape(layers=2, width=32, hidden=64, heads=2, key_heads=1, vocabulary=64, context=16)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.key_heads = shape.heads, shape.key_heads
        self.head = shape.width // shape.heads
        self.qkv = nn.Linear(
            shape.width, (shape.heads + 2 * shape.key_heads) * self.head, bias=False
        )
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, -1, self.head).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.key_heads, self.key_heads], dim=1)
        q, k = _turned(q, turns), _turned(k, turns)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        half = shape.width // shape.heads // 2
        angles = torch.arange(shape.context)[:, None] * 5e5 ** (-torch.arange(half) / half)
        self.register_buffer("turns", torch.cat([angles.cos(), angles.sin()], -1), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x, self.turns[: tokens.shape[1]])
        return F.linear(self.norm(x), self.token.weight)  # tied, and in high precision


def make_llama(card: Card, layers: int | None = None) -> tuple[Llama, Shape]:
    """The model on the card, `layers` deep instead of its 16."""
    depth = layers or Shape.layers
    shape = SMALL if card.small else Shape(layers=depth)
    torch.manual_seed(0)
    with torch.device(card.device):
        model = Llama(shape)
    return model.to(card.dtype), shape


def make_step(
    model: Llama, shape: Shape, card: Card, table: PrecisionMap | None, *, batch: int = 4
) -> Callable[[], Tensor]:
    """One training step on random tokens; `table` is that of the model's formats, if it has one."""
    fused = card.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    tokens = torch.randint(shape.vocabulary, (batch, shape.context + 1), device=card.device)

    def step() -> Tensor:
        with nullcontext() if table is None else table.forward_context():
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if table is not None:
            table.step()
        return loss.detach()

    return step


def compile_blocks(model: Llama, card: Card) -> None:
    """Compile block by block, as torchtitan does: one graph serves them all."""
    for block in model.blocks:
        card.compile(block)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
