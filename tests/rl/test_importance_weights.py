"""Importance weights, against the formulas in 60 decimal digits, and their laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp.rl import (
    check_tokens,
    masked_importance_weights,
    truncated_importance_weights,
)
from tests.rl.decimals import exact_weights

LEVELS = ("token", "sequence", "geometric")
CAP, LOW, HIGH = 2.0, 0.5, 5.0


def truncated(*batch: Tensor | None, level: str) -> Tensor:
    return truncated_importance_weights(*batch, cap=CAP, level=level)


def masked(*batch: Tensor | None, level: str) -> Tensor:
    return masked_importance_weights(*batch, low=LOW, high=HIGH, level=level)


BOUNDS = {truncated: (0.0, CAP, True), masked: (LOW, HIGH, False)}


def batch_of(sigma: float, shape: tuple[int, int] = (6, 24)) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities by rollout and training, and a mask with one empty row."""
    rollout = -torch.rand(shape, dtype=torch.float64) * 4 - 1e-3
    train = (rollout + sigma * torch.randn(shape, dtype=torch.float64)).clamp(max=0)
    mask = torch.rand(shape) < 0.7
    mask[2] = False
    mask[3, 0] = True
    return rollout, train, mask


class TestValues:
    @pytest.mark.parametrize("of", BOUNDS)
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("sigma", [1e-7, 1e-3, 0.3, 3.0])
    def test_to_twelve_digits(self, of: Callable[..., Tensor], level: str, sigma: float) -> None:
        batch = batch_of(sigma)
        found = of(*batch, level=level)
        assert found.dtype == torch.float64
        low, high, truncates = BOUNDS[of]
        exact = exact_weights(*batch, level, low=low, high=high, truncates=truncates)
        for row, expected in zip(found.tolist(), exact, strict=True):
            for weight, value in zip(row, expected, strict=True):
                assert weight == pytest.approx(float(value or 0), rel=1e-12, abs=0)

    @pytest.mark.parametrize("of", BOUNDS)
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_smaller_dtypes_within_an_ulp_of_float32(
        self, of: Callable[..., Tensor], level: str, dtype: torch.dtype
    ) -> None:
        rollout, train, mask = batch_of(0.3, (4, 400))
        rollout, train = rollout.to(dtype), train.to(dtype)
        found = of(rollout, train, mask, level=level)
        assert found.dtype == torch.float32
        low, high, truncates = BOUNDS[of]
        exact = exact_weights(rollout, train, mask, level, low=low, high=high, truncates=truncates)
        expected = torch.tensor([[float(w or 0) for w in row] for row in exact]).float()
        assert within_ulps(found, expected, 1)

    def test_sides_of_two_dtypes(self) -> None:
        rollout, train, mask = batch_of(0.3)
        found = truncated(rollout.bfloat16(), train, mask, level="token")
        assert torch.equal(
            found, truncated(rollout.bfloat16().double(), train, mask, level="token")
        )

    def test_a_sequence_of_a_hundred_thousand_tokens(self) -> None:
        rollout = -torch.rand(1, 100_000) - 0.1
        train = (rollout + 1e-3 * torch.randn(rollout.shape)).clamp(max=0)
        found = truncated(rollout, train, None, level="sequence")
        sides = zip(rollout[0].tolist(), train[0].tolist(), strict=True)
        r = sum(Decimal(p) - Decimal(q) for q, p in sides)
        expected = torch.tensor(min(float(r.exp()), CAP)).expand(found.shape)
        assert within_ulps(found, expected, 2)


def within_ulps(found: Tensor, expected: Tensor, ulps: int) -> bool:
    bits, others = found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32)
    return bool(((bits.long() - others.long()).abs() <= ulps).all())


values = st.one_of(
    st.floats(-30, -1e-6), st.floats(-1e-3, -1e-6), st.sampled_from([-0.0, -1.0, -700.0])
)
tokens = st.tuples(values, values, st.booleans())
bounds = st.tuples(st.floats(0.01, 1), st.floats(1, 100))


def columns(drawn: list[tuple[float, float, bool]], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = (torch.tensor(x, dtype=torch.float64) for x in zip(*drawn, strict=True))
    rollout, train, mask = (part.repeat(rows, 1) for part in parts)
    return rollout, train, mask


class TestLaws:
    @given(st.lists(tokens, min_size=1, max_size=8), bounds, st.sampled_from(LEVELS))
    @settings(max_examples=60, deadline=None)
    def test_any_tokens(
        self, drawn: list[tuple[float, float, bool]], band: tuple[float, float], level: str
    ) -> None:
        batch, (low, high) = columns(drawn, 2), band
        mask = batch[2].bool()
        cut = truncated_importance_weights(*batch, cap=high, level=level)
        inside = masked_importance_weights(*batch, low=low, high=high, level=level)
        above = masked_importance_weights(*batch, low=0, high=high, level=level)
        below = masked_importance_weights(*batch, low=low, high=None, level=level)
        free = masked_importance_weights(*batch, low=None, high=math.inf, level=level)
        for weights in (cut, inside, above, below, free):
            assert weights.isfinite().all()
            assert not weights[~mask].any()
        # one-sided is two-sided with an open side; both sides together leave what each leaves
        assert torch.equal(inside, torch.where((above > 0) & (below > 0), free, 0.0))
        assert torch.equal(cut, free.clamp(max=high))
        assert torch.equal(above, torch.where(free <= high, free, 0.0))
        # what counts for something has the true weight
        assert torch.equal(inside[inside > 0], free[inside > 0])
        # equal rows have equal weights
        assert torch.equal(cut[0], cut[1])
        if level != "token":
            assert len({*cut[mask].tolist()}) <= 1

    @given(st.lists(tokens, min_size=1, max_size=8), bounds)
    @settings(max_examples=40, deadline=None)
    def test_levels_agree_at_length_one(
        self, drawn: list[tuple[float, float, bool]], band: tuple[float, float]
    ) -> None:
        rollout, train, mask = (x[:1].T for x in columns(drawn, 1))
        for of in (
            lambda level: truncated_importance_weights(
                rollout, train, mask, cap=band[1], level=level
            ),
            lambda level: masked_importance_weights(
                rollout, train, mask, low=band[0], high=band[1], level=level
            ),
        ):
            assert torch.equal(of("token"), of("sequence"))
            assert torch.equal(of("token"), of("geometric"))

    @given(st.lists(tokens, min_size=1, max_size=8), st.sampled_from(LEVELS))
    @settings(max_examples=40, deadline=None)
    def test_identity_without_mismatch(
        self, drawn: list[tuple[float, float, bool]], level: str
    ) -> None:
        rollout, _, mask = columns(drawn, 1)
        for of in BOUNDS:
            assert torch.equal(of(rollout, rollout.clone(), mask, level=level), mask.double())

    @pytest.mark.parametrize("level", LEVELS)
    def test_what_is_masked_changes_nothing(self, level: str) -> None:
        rollout, train, mask = batch_of(0.3)
        padding = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).double().repeat(6, 6)
        dirty = [torch.where(mask, x, padding) for x in (rollout, train)]
        for of in BOUNDS:
            expected = of(rollout, train, mask, level=level)
            for dtype in (torch.bool, torch.long, torch.float32):
                assert torch.equal(of(*dirty, mask.to(dtype), level=level), expected)


class TestEdges:
    @pytest.mark.parametrize("of", BOUNDS)
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
    def test_no_token(self, of: Callable[..., Tensor], level: str, shape: tuple[int, int]) -> None:
        x = torch.full(shape, -1.0)
        assert torch.equal(of(x, x, torch.zeros(shape), level=level), torch.zeros(shape))

    @pytest.mark.parametrize("of", BOUNDS)
    @pytest.mark.parametrize(
        ("q", "p"), [(-math.inf, -1.0), (-1.0, -math.inf), (math.nan, -1.0), (-math.inf, -math.inf)]
    )
    def test_what_has_no_weight_has_none(
        self, of: Callable[..., Tensor], q: float, p: float
    ) -> None:
        rollout = torch.tensor([[-1.0, q, -1.0], [-1.0, -1.0, -1.0]])
        train = torch.tensor([[-1.0, p, -1.1], [-1.0, -1.0, -1.0]])
        assert (of(rollout, train, None, level="token") > 0).tolist() == [
            [True, False, True],
            [True] * 3,
        ]
        for level in ("sequence", "geometric"):
            weights = of(rollout, train, None, level=level)
            assert torch.equal(weights, torch.tensor([[0.0] * 3, [1.0] * 3]))

    def test_mismatch_beyond_the_range_of_exp(self) -> None:
        rollout, train = torch.tensor([[-5000.0, -1.0]]), torch.tensor([[-1.0, -5000.0]])
        assert truncated(rollout, train, None, level="token").tolist() == [[CAP, 0.0]]
        assert masked(rollout, train, None, level="token").tolist() == [[0.0, 0.0]]
        open_side = masked_importance_weights(rollout, train, None, low=0.5, high=None)
        assert open_side.isfinite().all()
        assert open_side[0, 0] > 1e38

    def test_no_cap(self) -> None:
        """Without a cap both kinds are the plain ratio."""
        rollout = torch.tensor([[-9.0, -1.0, -800.0]])
        train = torch.tensor([[-1.0, -9.0, -1.0]])
        open_sides = masked_importance_weights(rollout, train, None, low=None, high=None)
        uncapped = truncated_importance_weights(rollout, train, None, cap=math.inf)
        assert torch.equal(uncapped, open_sides)
        assert uncapped.isfinite().all()

    @pytest.mark.parametrize("floor", [0.0, 0.5])
    def test_floor(self, floor: float) -> None:
        rollout, train = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-9.0, -1.2]])
        found = truncated_importance_weights(
            rollout, train, torch.tensor([[1, 0]]), cap=5, floor=floor
        )
        assert found.tolist() == [[pytest.approx(max(math.exp(-8), floor)), 0.0]]


class TestGradients:
    @pytest.mark.parametrize("of", BOUNDS)
    def test_weights_are_constants(self, of: Callable[..., Tensor]) -> None:
        rollout, train, mask = batch_of(0.3)
        train.requires_grad_()
        assert not of(rollout, train, mask, level="token").requires_grad

    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("kind", ["truncated", "masked"])
    def test_they_flow_where_asked(self, level: str, kind: str) -> None:
        rollout, train, mask = batch_of(0.3)
        train[0, 0], rollout[0, 0] = -0.1, -5000.0
        rollout[1, 1], mask[0, 0], mask[1, 1] = -math.inf, True, True
        train.requires_grad_()
        options = {"cap": CAP} if kind == "truncated" else {"low": LOW, "high": HIGH}
        function = {
            "truncated": truncated_importance_weights,
            "masked": masked_importance_weights,
        }[kind]
        weights = function(rollout, train, mask, level=level, detach=False, **options)
        (gradient,) = torch.autograd.grad(weights.sum(), train)
        assert gradient.isfinite().all()
        assert not gradient[~mask].any()
        assert gradient[0, 0] == 0
        # d w / d log p = w, where nothing is cut off
        if level == "token":
            free = (weights > 0) & (weights < CAP)
            assert torch.equal(gradient[free], weights.detach()[free])

    def test_autocast_changes_nothing(self) -> None:
        batch = batch_of(0.3)
        plain = truncated(*(x.float() for x in batch), level="sequence")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(truncated(*(x.float() for x in batch), level="sequence"), plain)


class TestRefusals:
    x = torch.full((2, 3), -1.0)

    @pytest.mark.parametrize("of", BOUNDS)
    def test_what_is_no_batch(self, of: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match=r"train_logprobs must have the shape .*\(2, 3\), got"):
            of(self.x, self.x[:, :2], None, level="token")
        with pytest.raises(ValueError, match=r"mask must have the shape"):
            of(self.x, self.x, torch.ones(2, 1), level="token")
        with pytest.raises(ValueError, match=r"must be \[batch, tokens\], got shape \(3,\)"):
            of(self.x[0], self.x[0], None, level="token")
        with pytest.raises(ValueError, match=r"must be floating-point, got torch.int64"):
            of(self.x.long(), self.x, None, level="token")
        with pytest.raises(ValueError, match=r"level must be one of token, .* got 'tokens'; did"):
            of(self.x, self.x, None, level="tokens")

    @pytest.mark.parametrize("of", BOUNDS)
    @pytest.mark.parametrize("side", [0, 1])
    def test_probabilities(self, of: Callable[..., Tensor], side: int) -> None:
        batch = [self.x, self.x.clone()]
        batch[side] = self.x.exp()
        with pytest.raises(ValueError, match=r"log-probabilities, 0 or less, got 0.3679; take"):
            of(*batch, None, level="token")
        assert not of(*batch, torch.zeros(2, 3), level="token").any()

    @pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
    def test_caps(self, cap: float) -> None:
        with pytest.raises(ValueError, match="floor and cap must be"):
            truncated_importance_weights(self.x, self.x, None, cap=cap)

    @pytest.mark.parametrize("band", [(2.0, 1.0), (-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0)])
    def test_bands(self, band: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match="low and high must be"):
            masked_importance_weights(self.x, self.x, None, low=band[0], high=band[1])

    def test_what_are_no_numbers(self) -> None:
        with pytest.raises(ValueError, match="cap must be a number, got None"):
            truncated_importance_weights(self.x, self.x, None, cap=None)  # pyright: ignore
        with pytest.raises(ValueError, match="low must be a number, got 'a'"):
            masked_importance_weights(self.x, self.x, None, low="a", high=2)  # pyright: ignore

    @pytest.mark.parametrize("of", BOUNDS)
    def test_what_are_no_tensors(self, of: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match="rollout_logprobs must be a Tensor, got a list; torc"):
            of(self.x.tolist(), self.x, None, level="token")
        with pytest.raises(ValueError, match="mask must be a Tensor, got a ndarray"):
            of(self.x, self.x, self.x.numpy(), level="token")


class TestTokens:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def test_equal_where_they_count(self) -> None:
        other = torch.tensor([[1, 2, 9], [4, 5, 6]])
        check_tokens(self.ids, self.ids.clone())
        check_tokens(self.ids, other, torch.tensor([[1, 1, 0], [1, 1, 1]]))
        with pytest.raises(ValueError, match=r"got 9 at \[0, 2\] where the rollout has 3, and 1"):
            check_tokens(self.ids, other)

    def test_what_are_no_ids(self) -> None:
        with pytest.raises(ValueError, match="train_tokens must be token ids, integers, got"):
            check_tokens(self.ids, self.ids.float())
        with pytest.raises(ValueError, match="train_tokens must have the shape of rollout_tokens"):
            check_tokens(self.ids, self.ids[:, :2])
