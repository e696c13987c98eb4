"""Tiny mixtures of experts, as transformers and torchtitan write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 64
SIZES: dict[str, Any] = dict(
    vocab_size=TOKENS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MORE: dict[str, dict[str, Any]] = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48),
    "Qwen2Moe": dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=32,
    ),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "DeepseekV3": dict(
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
"""What each model's configuration has beside `SIZES`."""


def mixture(name: str = "Mixtral", implementation: str = "eager", **changes: Any) -> Any:
    """A tiny model of transformers, with random weights of one seed."""
    transformers: Any = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | MORE[name] | changes))
    config._experts_implementation = implementation
    return getattr(transformers, f"{name}ForCausalLM")(config)


def batch(seed: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Of the next token."""
    return model(input_ids=ids, labels=ids).loss


class GroupedExperts(nn.Module):
    """As torchtitan's: SwiGLU, tokens sorted by expert already."""

    def __init__(self, experts: int = 4, dim: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)
        self.w3 = nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5)

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        sizes = num_tokens_per_expert.tolist()
        parts = x[: sum(sizes)].split(sizes)
        mixed = [
            (F.silu(part @ w1.t()) * (part @ w3.t())) @ w2.t()
            for part, w1, w2, w3 in zip(parts, self.w1, self.w2, self.w3, strict=True)
        ]
        return torch.cat([*mixed, x.new_zeros(x.shape[0] - sum(sizes), x.shape[1])])
