"""What the tests share: a tiny GPT on real text, as a plain module and as a LightningModule."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import PrecisionFallback
from lightning_fp.format_names import TABLE
from lightning_fp.stability.supervise.supervisor import Supervisor

CONTEXT = 16
FORMATS = (*(row.name for row in TABLE if row.name != "nvfp4"), "e8m3")
"""One name of every kind of format, but for the one that needs the hardware."""


UNIT = 2.0**-24
"""Unit roundoff of float32."""


def sum_rtol(*lengths: int) -> float:
    """How far two float32 sums of the same terms of one sign may be apart, relatively.

    Each is off by at most `length - 1` roundings, in whatever order a CPU adds (Higham, Accuracy
    and Stability of Numerical Algorithms, 2002, 4.2). Where the terms are sums themselves, e.g.
    elements of a product, the lengths add up.
    """
    return 2 * sum(lengths) * UNIT


def order_db(*lengths: int) -> float:
    """What float32 sums of these lengths agree to, in decibels, whatever order they are added in.

    With one thread the same product is added in one order; several threads share it out by its
    shape and layout.
    """
    return math.inf if torch.get_num_threads() == 1 else -20 * math.log10(sum_rtol(*lengths))


def assert_product(found: Tensor, a: Tensor, b: Tensor) -> None:
    """`found` is `a @ b` in float32, summed in whatever order (Higham 2002, 3.5)."""
    bound = sum_rtol(a.shape[-1]) * (a.abs().double() @ b.abs().double())
    assert ((found.double() - a.double() @ b.double()).abs() <= bound).all()


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        mixing = self.qkv(self.norm(x))  # of the whole text, where a rank has a part of x
        batch, time, width = mixing.shape[0], mixing.shape[1], x.shape[2]
        q, k, v = (
            part.view(batch, time, 2, width // 2).transpose(1, 2)
            for part in mixing.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden = F.gelu(self.fc1(self.norm(x)))
        return x + F.dropout(self.fc2(hidden), self.dropout, self.training)


class TinyGPT(nn.Module):
    """Byte-level, 2 blocks of 4 linear layers each, and an output head."""

    def __init__(self, blocks: int = 2, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def next_byte_loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class LanguageModel(L.LightningModule):
    """A tiny GPT that remembers its training losses and in which formats its steps ran."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = TinyGPT(**options) if model is None else model
        self.losses: list[float] = []
        self.val_losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = next_byte_loss(self, batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.val_losses.append(next_byte_loss(self, batch).item())

    test_step = validation_step

    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch[:, :-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def text_rows(count: int = 400) -> Tensor:
    """[count, CONTEXT + 1] bytes of the standard library's sources."""
    text = Path(argparse.__file__).read_bytes()[: count * (CONTEXT + 1)]
    return torch.tensor(list(text)).view(-1, CONTEXT + 1)


def text_loader(count: int = 400, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(text_rows(count), batch_size=batch_size, **options)


def make_trainer(plugin: Precision | None, **options: Any) -> L.Trainer:
    """A quiet CPU Trainer that writes nothing unless asked to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    plugins = None if plugin is None else [plugin]
    return L.Trainer(**{**quiet, "plugins": plugins, **options})


def fit(
    plugin: Precision | None, model: L.LightningModule | None = None, **options: Any
) -> LanguageModel:
    """Train a LanguageModel (50 steps unless told otherwise) and return it."""
    model = LanguageModel() if model is None else model
    loader = options.pop("loader", None)
    trainer = make_trainer(plugin, **{"max_steps": 50, **options})
    trainer.fit(model, text_loader() if loader is None else loader)
    return model


def supervisor_of(fallback: PrecisionFallback) -> Supervisor:
    """What watches, once a fit has begun."""
    assert fallback.supervisor is not None
    return fallback.supervisor


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantisation noise ratio in decibels."""
    reference, value = reference.detach().double(), value.detach().double()
    return 20 * math.log10(reference.norm() / (reference - value).norm())


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for backward, of everything run in the block."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(kept: list[Tensor], parameters: Iterator[nn.Parameter]) -> int:
    """Bytes of distinct storages, those of parameters aside."""
    aside = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept
    }
    return sum(size for pointer, size in storages.items() if pointer not in aside)
