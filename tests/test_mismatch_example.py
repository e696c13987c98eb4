"""FP16 brings the rollout engine and the trainer as close as its mantissa promises."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import fp16_rl_mismatch
    finally:
        sys.path.remove(str(EXAMPLES))
    return fp16_rl_mismatch


SMALL = {"steps": 6, "batch": 32, "length": 6, "pretraining": 40}


@pytest.mark.parametrize("variant", ["dense", "lora"])
def test_fp16_over_bf16(example: ModuleType, variant: str) -> None:
    """Three more bits: a factor of 8 in |r| and, squared, of 64 in k3."""
    bf16, fp16 = (
        example.train(dtype, variant, **SMALL).whole for dtype in (torch.bfloat16, torch.float16)
    )
    assert bf16["tokens"] == fp16["tokens"] == 6 * 32 * 6
    assert 5 < bf16["logprob_abs_diff_mean"] / fp16["logprob_abs_diff_mean"] < 12
    assert bf16["k3_kl"] / fp16["k3_kl"] > 30
    assert 1e-8 < fp16["k3_kl"] < 1e-5


def test_moe_routes_in_fp32(example: ModuleType) -> None:
    policy = example.pretrained("moe", length=4, steps=1, seed=0)
    engine = example.engine_of(policy, torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in engine.named_parameters()}
    routers = {name for name in dtypes if "router" in name}
    assert len(routers) == 2
    assert {dtypes.pop(name) for name in routers} == {torch.float32}
    assert set(dtypes.values()) == {torch.float16}


def test_merged_adapters_are_the_adapters(example: ModuleType) -> None:
    policy = example.pretrained("lora", length=4, steps=1, seed=0)
    for name, parameter in policy.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 128, (2, 9))
    engine = example.engine_of(policy, torch.float32)
    assert not any("down" in name for name, _ in engine.named_parameters())
    torch.testing.assert_close(engine(tokens), policy(tokens), rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_is_the_forward(example: ModuleType) -> None:
    """In fp32 both sides agree, so that what differs in the example is precision alone."""
    policy = example.pretrained("dense", length=4, steps=20, seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = example.some_prompts(8, 4, generator)
    tokens, sampled = example.rollout(policy, prompts, 4, generator)
    again = example.answer_logprobs(policy, tokens, 4, torch.float32)
    torch.testing.assert_close(sampled, again, rtol=1e-5, atol=1e-5)


def test_decoding_given_bytes(example: ModuleType) -> None:
    """What `lightning-fp mismatch` is given: policy, bytes, and the rollout's way through them."""
    policy = example.pretrained("dense", length=4, steps=1, seed=0)
    tokens = torch.randint(0, 128, (2, 9))
    torch.testing.assert_close(example.decode(policy, tokens), policy(tokens), rtol=1e-5, atol=1e-5)


def test_early_warning(example: ModuleType) -> None:
    """Nothing is said while engine and trainer have the same weights, and soon after they part."""
    run = example.train(torch.bfloat16, steps=26, batch=16, length=4, pretraining=40, last_sync=18)
    assert 18 < run.warned <= 24
    assert "training and rollout drift apart" in run.warning
