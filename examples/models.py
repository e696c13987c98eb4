"""Models for `lightning-fp plan`, which builds them without allocating memory.

lightning-fp plan examples/models.py:llama_like --cuda-fp8
lightning-fp plan examples/models.py:llama_like --cuda-fp8 --layers 're:blocks.(0|31)[.].*=bf16'
lightning-fp plan examples/models.py:mixture_of_experts --scaling fp8-rowwise
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention with fewer key and value heads than query heads, without positions."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Every token goes to its best expert, which the router chooses."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(dim=-1)
        best = weights.argmax(dim=-1)
        chosen = [(best == i).unsqueeze(-1) * expert(x) for i, expert in enumerate(self.experts)]
        return sum(chosen) * weights.amax(dim=-1, keepdim=True)


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, width: int, vocabulary: int, blocks: list[Block]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.blocks(self.embedding(tokens))))


def llama_like() -> tuple[nn.Module, Tensor]:
    """The shapes of an 8B Llama, and an input of 4096 tokens with which FLOPs are counted."""
    blocks = [Block(4096, Attention(4096, 32, 8), SwiGLU(4096, 14336)) for _ in range(32)]
    return Decoder(4096, 128256, blocks), torch.zeros(1, 4096, dtype=torch.long)


def mixture_of_experts() -> tuple[nn.Module, Tensor]:
    """Small, with a router: it stays in high precision."""
    blocks = [Block(512, Attention(512, 8, 8), Experts(512, 2048, 8)) for _ in range(4)]
    return Decoder(512, 32000, blocks), torch.zeros(1, 128, dtype=torch.long)
