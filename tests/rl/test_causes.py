"""What a mismatch comes from, where the cause is known by construction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fp.metrics.log_ratio import excess_over_linear
from lightning_fp.rl import Causes, SampleOrigin, mismatch_causes
from lightning_fp.rl.causes import cause_sums, causes_of, merged

BATCH, TOKENS = 8, 50


def batch_of(size: Tensor | float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rollout = -torch.rand(BATCH, TOKENS, generator=generator, dtype=torch.float64) * 3 - 2
    noise = torch.randn(BATCH, TOKENS, generator=generator, dtype=torch.float64)
    return rollout, rollout + size * noise


def experts(moved: Tensor) -> dict[str, Any]:
    """Two layers with two experts of eight for each token; in the second, `moved` tokens differ."""
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(BATCH, TOKENS, 8, generator=generator).topk(2, dim=2).indices
    second = torch.where(moved.unsqueeze(2), (first + 1) % 8, first)
    return {
        "rollout_experts": {"a": first, "b": first},
        # in another order: the same experts
        "train_experts": {"a": first.flip(2), "b": second},
    }


STALE = torch.arange(BATCH) < 2
MOVED = (torch.arange(TOKENS) % 10 == 0).expand(BATCH, TOKENS)


def found(size: Tensor | float, mask: Tensor | None = None, **origin: Any) -> Causes:
    return mismatch_causes(*batch_of(size), mask, SampleOrigin(**origin))


class TestMain:
    def test_precision(self) -> None:
        causes = found(1e-3, rollout_version=5, train_version=5, **experts(torch.zeros_like(MOVED)))
        assert causes.main == "precision"
        assert causes.share == {"precision": 1.0, "routing": 0.0, "staleness": 0.0}
        assert causes.rerouted_tokens == {"a": 0.0, "b": 0.0}
        assert causes.stale_tokens == 0
        assert "fp16" in causes.sentence

    def test_staleness(self) -> None:
        size = torch.where(STALE, 0.1, 1e-3).double().unsqueeze(1)
        versions = torch.where(STALE, 3, 5)
        causes = found(size, rollout_version=versions, train_version=5)
        assert causes.main == "staleness"
        assert causes.share["staleness"] > 0.99
        assert causes.stale_tokens == 0.25
        assert (causes.staleness_mean, causes.staleness_max) == (0.5, 2)
        assert causes.unknown == ("routing", "sampling")
        assert "synchronise" in causes.sentence

    def test_routing(self) -> None:
        size = torch.where(MOVED, 0.1, 1e-3).double()
        causes = found(size, **experts(MOVED))
        assert causes.main == "routing"
        assert causes.rerouted_tokens == {"a": 0.0, "b": pytest.approx(0.1)}
        assert causes.k3["rerouted"] > 1e3 * causes.k3["rest"]
        assert "expert ids" in causes.sentence

    def test_sampling(self) -> None:
        causes = found(
            0.1, rollout_sampling={"temperature": 0.7, "top_p": 1.0}, train_sampling={"top_k": -1}
        )
        assert causes.main == "sampling"
        assert causes.sampling == ("temperature",)
        assert "sampling (temperature)" in causes.sentence
        both = {"temperature": 0.7}
        assert found(0.1, rollout_sampling=both, train_sampling=both).main == "precision"

    def test_what_is_not_asked_is_not_acquitted(self) -> None:
        causes = found(0.1)
        assert causes.main == "precision"
        assert "(staleness and routing not given, so not told apart)" in causes.sentence

    def test_without_fresh_samples(self) -> None:
        causes = found(0.1, rollout_version=4, train_version=5)
        assert causes.share == {"precision": 0.0, "staleness": 1.0}
        assert "no other samples" in causes.sentence

    def test_none(self) -> None:
        causes = found(0.0, rollout_version=4, train_version=5)
        assert causes.main is None
        assert causes.sentence == "training and rollout agree"
        empty = found(0.1, mask=torch.zeros(BATCH, TOKENS), rollout_version=4, train_version=5)
        assert empty.main is None
        assert "cause/stale_tokens" not in empty.numbers()


class TestSums:
    def test_shares_are_of_k3(self) -> None:
        size = torch.where(STALE.unsqueeze(1), 0.1, 0.02).double()
        rollout, train = batch_of(size)
        causes = found(size, rollout_version=torch.where(STALE, 4, 5), train_version=5)
        k3 = excess_over_linear(train - rollout)
        usual = k3[~STALE].mean()
        expected = (k3[STALE] - usual).sum() / k3.sum()
        assert causes.share["staleness"] == pytest.approx(expected.item(), rel=1e-12)
        assert causes.k3["stale"] == pytest.approx(k3[STALE].mean().item(), rel=1e-12)
        assert sum(causes.share.values()) == pytest.approx(1)

    def test_parts_add_up(self) -> None:
        size = torch.where(MOVED, 0.1, 1e-3).double()
        rollout, train = batch_of(size)
        mask = torch.rand(BATCH, TOKENS) < 0.8
        versions = torch.where(STALE, 3, 5)
        ids = experts(MOVED)

        def sums(rows: slice) -> Any:
            part = {side: {k: v[rows] for k, v in ids[side].items()} for side in ids}
            origin = SampleOrigin(rollout_version=versions[rows], train_version=5, **part)
            return cause_sums(rollout[rows], train[rows], mask[rows], origin)

        parts = [sums(slice(0, 3)), sums(slice(3, 8))]
        whole, together = causes_of(sums(slice(0, 8))), causes_of(merged(parts))
        assert whole.share == pytest.approx(together.share)
        assert whole.rerouted_tokens == together.rerouted_tokens
        assert (whole.stale_tokens, whole.staleness_max) == (together.stale_tokens, 2)

    def test_masked_and_broken_tokens_are_nobodys(self) -> None:
        rollout, train = batch_of(1e-3)
        origin = SampleOrigin(rollout_version=torch.where(STALE, 3, 5), train_version=5)
        mask = torch.ones(BATCH, TOKENS)
        mask[:, 0], rollout[:, 0] = 0, math.nan
        rollout[0, 1] = -math.inf
        causes = mismatch_causes(rollout, train, mask, origin)
        assert causes.stale_tokens == pytest.approx((2 * 49 - 1) / (8 * 49 - 1))
        assert not math.isnan(causes.k3["stale"])


class TestRefusals:
    def test_one_side(self) -> None:
        with pytest.raises(ValueError, match=r"rollout_version and train_version must be given bo"):
            SampleOrigin(train_version=3)
        layer = torch.zeros(2, 3, dtype=torch.long)
        with pytest.raises(ValueError, match="must have the same layers, got b on one side only"):
            SampleOrigin(rollout_experts={"a": layer, "b": layer}, train_experts={"a": layer})

    def test_weights_that_training_does_not_have_yet(self) -> None:
        with pytest.raises(ValueError, match="must be train_version or earlier, got one that is 2"):
            found(0.1, rollout_version=torch.where(STALE, 9, 7), train_version=7)

    def test_sampling_parameters_that_are_no_numbers(self) -> None:
        with pytest.raises(ValueError, match="train_sampling must be a dict from texts to numbers"):
            SampleOrigin(train_sampling={"stop": "."})  # pyright: ignore[reportArgumentType]

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match="rollout_version must be one number, "):
            found(0.1, rollout_version=torch.zeros(3), train_version=1)
        layer = torch.zeros(BATCH, TOKENS + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="experts of 'a' must be"):
            found(0.1, rollout_experts={"a": layer}, train_experts={"a": layer})

    def test_tokens(self) -> None:
        ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
        with pytest.raises(ValueError, match="train_tokens must be the tokens that were sampled"):
            found(0.1, rollout_tokens=ids, train_tokens=ids + 1)
