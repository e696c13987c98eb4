"""Three nets of a second or two, built unlike the demo's GPT, with batches that a seed decides.

Their losses stay well above zero: text has an entropy, some labels are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.demo.data import read_sources

SYMBOLS, CONTEXT = 64, 16
SIZE, PATCH, CLASSES = 16, 4, 10
FEATURES, CODE = 32, 16
BATCH = 8


class Batches:
    """A loader of batches that are there; to Lightning a bare list would be a list of loaders."""

    def __init__(
        self, batches: list[Any], spoil: Callable[[Any, int], Any] = lambda batch, _: batch
    ) -> None:
        self.batches = [spoil(batch, number) for number, batch in enumerate(batches)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Net(L.LightningModule):
    """What the nets have in common.

    Args:
        seed: of the weights.
        rate: learning rate.
    """

    rate = 3e-3

    def __init__(self, seed: int, rate: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.learning_rate = self.rate if rate is None else rate
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]

    @classmethod
    def batches(cls, count: int, seed: int) -> list[Any]:
        """The same for the same seed, and longer lists begin alike."""
        raise NotImplementedError


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        half = width // heads // 2
        angles = torch.arange(CONTEXT)[:, None] * 100.0 ** (-torch.arange(half) / half)
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(qkv[0]), self.rotate(qkv[1])
        mixed = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turn).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = LlamaAttention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TinyLlama(Net):
    """RMSNorm, SwiGLU, rotary positions, on real text in 64 symbols."""

    def build(self) -> None:
        width = 32
        self.token = nn.Embedding(SYMBOLS, width)
        self.blocks = nn.Sequential(LlamaBlock(width, heads=2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens))))

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @classmethod
    def batches(cls, count: int, seed: int) -> list[Tensor]:
        text = _text()
        found = []
        for number in range(count):
            starts = torch.randint(
                len(text) - CONTEXT - 1, (BATCH, 1), generator=_dice(seed, number)
            )
            found.append(text[starts + torch.arange(CONTEXT + 1)])
        return found


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, -1)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class TinyViT(Net):
    """Patches of noisy pictures of ten kinds; a tenth of the labels are wrong."""

    def build(self) -> None:
        width = 32
        self.patch = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(ViTBlock(width, heads=2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = pictures.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(1, 2).flatten(2)
        return self.head(self.norm(self.blocks(self.patch(patches) + self.position)).mean(dim=1))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    @classmethod
    def batches(cls, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        kinds = torch.randn(CLASSES, SIZE, SIZE, generator=_dice(0, 0))
        found = []
        for number in range(count):
            dice = _dice(seed, number)
            kind = torch.randint(CLASSES, (2 * BATCH,), generator=dice)
            noise = torch.randn(2 * BATCH, SIZE, SIZE, generator=dice)
            other = torch.randint(CLASSES, (2 * BATCH,), generator=dice)
            wrong = torch.rand(2 * BATCH, generator=dice) < 0.1
            found.append((0.5 * kinds[kind] + noise, torch.where(wrong, other, kind)))
        return found


class BatchNormNet(Net):
    """Encoder and classifier under one optimizer, a decoder under another; BatchNorm throughout."""

    rate = 2e-3

    def build(self) -> None:
        self.automatic_optimization = False
        self.encoder = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, CODE),
        )  # fmt: skip
        self.classifier = nn.Linear(CODE, CLASSES)
        self.decoder = nn.Sequential(
            nn.Linear(CODE, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, FEATURES)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        return self.classifier(code), self.decoder(code.detach())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, kind = batch
        logits, again = self(x)
        return F.cross_entropy(logits.float(), kind) + F.mse_loss(again.float(), x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        optimizers = self.optimizers()
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        first = [*self.encoder.parameters(), *self.classifier.parameters()]
        rate = self.learning_rate
        return [
            torch.optim.AdamW(first, lr=rate),
            torch.optim.SGD(self.decoder.parameters(), lr=10 * rate, momentum=0.9),
        ]

    @classmethod
    def batches(cls, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        kinds = torch.randn(CLASSES, FEATURES, generator=_dice(1, 0))
        found = []
        for number in range(count):
            dice = _dice(seed, number)
            kind = torch.randint(CLASSES, (4 * BATCH,), generator=dice)
            noise = torch.randn(4 * BATCH, FEATURES, generator=dice)
            other = torch.randint(CLASSES, (4 * BATCH,), generator=dice)
            wrong = torch.rand(4 * BATCH, generator=dice) < 0.1
            found.append((kinds[kind] + noise, torch.where(wrong, other, kind)))
        return found


class Regressor(Net):
    """Learns a smooth function of 16 features to little more than the noise of its values."""

    noise = 0.1

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(CODE, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, CODE)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]).float(), batch[1])

    @classmethod
    def batches(cls, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        inner = torch.randn(CODE, CODE, generator=_dice(2, 0)) / CODE**0.5
        found = []
        for number in range(count):
            dice = _dice(seed, number)
            x, noise = torch.randn(2, 4 * BATCH, CODE, generator=dice)
            found.append((x, (x @ inner).tanh() + cls.noise * noise))
        return found


class NoisyRegressor(Regressor):
    """The same with so much noise that no format matters."""

    noise = 0.5


def _dice(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


@cache
def _text() -> Tensor:
    return read_sources()[0].long() % SYMBOLS
