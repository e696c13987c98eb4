"""Blocks that compute their activations again: the same gradients, in less memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_fp.stability.replay.recompute import blocks_of, recomputed
from tests.helper import kept_bytes, saved_tensors


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.dropout(self.up(x).relu(), 0.5))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(x).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def check_same_gradients_in_half_the_memory(
    model: nn.Module, blocks: list[nn.Module], x: Tensor
) -> None:
    before = gradients(model, x)
    with saved_tensors() as kept:
        model(x)
    with recomputed(blocks):
        again = gradients(model, x)
        with saved_tensors() as kept_again:
            model(x)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    assert kept_bytes(kept_again, model.parameters()) < kept_bytes(kept, model.parameters()) / 2


def test_the_gradients_are_the_same_to_the_bit() -> None:
    model, x = Stack(), torch.randn(16, 8)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    blocks = blocks_of(model, linears)
    assert blocks == [*model.blocks]  # neither single layers nor what has batch normalization
    check_same_gradients_in_half_the_memory(model, blocks, x)
    assert not any("forward" in vars(block) for block in blocks)


def test_a_replaced_forward_is_there_again_afterwards() -> None:
    block = Block()
    own = block.forward = lambda x: 2 * x
    with recomputed([block]):
        assert block.forward is not own
        assert torch.equal(block(torch.ones(2)), torch.full((2,), 2.0))
    assert block.forward is own


def test_a_perceptron_is_computed_again_in_segments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, layers = 16, [nn.Linear(8, 16)]
            for _ in range(5):
                layers += [nn.SiLU(), nn.Dropout(0.5), nn.Linear(width, width)]  # type: ignore[list-item]
            self.net = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().mean()

    model, x = Net(), torch.randn(64, 8)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    blocks = blocks_of(model, linears)
    assert blocks == [model.net]
    check_same_gradients_in_half_the_memory(model, blocks, x)
    assert "forward" not in vars(model.net)


def test_batches_that_are_normalized_are_not_computed_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    holder = nn.ModuleDict({"net": model})
    assert blocks_of(holder, [model[0], model[2]]) == []
