"""TrainingInferenceMismatch, against the formulas in 60 decimal digits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.metrics.mismatch_names import ALIASES
from tests.metrics.ranks import batches
from tests.two_ranks import run_on_two_ranks

QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
THRESHOLD = 2


# --- The formulas, as published -----------------------------------------------------------------


def exact(rollout: Tensor, train: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Everything but the quantiles, each formula written out naively."""
    mask = torch.ones_like(train) if mask is None else mask
    with localcontext() as context:
        context.prec = 60
        sequences: list[list[tuple[Decimal, Decimal]]] = []
        for row in zip(rollout.tolist(), train.tolist(), mask.tolist(), strict=True):
            tokens = [
                (Decimal(q), Decimal(p))
                for q, p, counts in zip(*row, strict=True)
                if counts and math.isfinite(p - q)
            ]
            if tokens:
                sequences.append(tokens)
        values = _formulas(sequences)
        return {name: float(value) for name, value in values.items()}


def _mean(values: list[Decimal]) -> Decimal:
    return sum(values, Decimal(0)) / len(values)


def _variance(values: list[Decimal]) -> Decimal:
    return _mean([(value - _mean(values)) ** 2 for value in values])


def _formulas(sequences: list[list[tuple[Decimal, Decimal]]]) -> dict[str, Decimal]:
    limit, bound = Decimal(THRESHOLD), Decimal(20)

    def weight(r: Decimal) -> Decimal:
        return max(-bound, min(bound, r)).exp()

    pairs = [pair for sequence in sequences for pair in sequence]
    r = [p - q for q, p in pairs]
    size = [abs(x) for x in r]
    w = [weight(x) for x in r]
    q, p = [x.exp() for x, _ in pairs], [x.exp() for _, x in pairs]
    difference = [abs(a - b) for a, b in zip(p, q, strict=True)]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    js = [
        (a / m - (a / m).ln() - 1 + b / m - (b / m).ln() - 1) / 2
        for a, b, m in zip(p, q, middle, strict=True)
    ]
    log_ppl = [(_mean([-b for _, b in s]), _mean([-a for a, _ in s])) for s in sequences]
    ppl_diff = [a - b for a, b in log_ppl]
    total = [sum((b - a for a, b in s), Decimal(0)) for s in sequences]
    clipped = [max(1 / limit, min(limit, x)) for x in w]
    n = len(r)
    values = {
        "kl": -_mean(r),
        "k3_kl": _mean([x.exp() - x - 1 for x in r]),
        "reverse_k3_kl": _mean([(-x).exp() + x - 1 for x in r]),
        "js_divergence": _mean(js),
        "chi2_token": _mean([x**2 for x in w]) - 1,
        "chi2_seq": _mean([weight(x) ** 2 for x in total]) - 1,
        "mult_prob_error": _mean([x.exp() for x in size]),
        "training_ppl": _mean([a.exp() for a, _ in log_ppl]),
        "training_log_ppl": _mean([a for a, _ in log_ppl]),
        "rollout_ppl": _mean([b.exp() for _, b in log_ppl]),
        "rollout_log_ppl": _mean([b for _, b in log_ppl]),
        "log_ppl_diff": _mean(ppl_diff),
        "log_ppl_abs_diff": _mean([abs(x) for x in ppl_diff]),
        "log_ppl_diff_max": max(ppl_diff),
        "log_ppl_diff_min": min(ppl_diff),
        "ppl_ratio": _mean([x.exp() for x in ppl_diff]),
        "rollout_is_mean": _mean(w),
        "rollout_is_std": _variance(clipped).sqrt(),
        "rollout_is_max": max(w),
        "rollout_is_min": min(w),
        "rollout_is_ratio_fraction_high": Decimal(sum(x > limit for x in w)) / n,
        "rollout_is_ratio_fraction_low": Decimal(sum(x < 1 / limit for x in w)) / n,
        "rollout_is_eff_sample_size": _mean(clipped) ** 2 / _mean([x**2 for x in clipped]),
        "rollout_is_abs_deviation": _mean([abs(x - 1) for x in w]),
        "rollout_probs_diff_max": max(difference),
        "rollout_probs_diff_mean": _mean(difference),
        "extreme_disagreement": Decimal(sum(x > Decimal("0.9") for x in difference)) / n,
        "logprob_abs_diff_mean": _mean(size),
        "logprob_abs_diff_max": max(size),
        "seq_logprob_abs_diff_mean": _mean([abs(x) for x in total]),
        "seq_logprob_abs_diff_max": max(abs(x) for x in total),
        "tis_weight_max": min(limit, max(w)),
        "tis_weight_min": min(limit, min(w)),
        "tokens": Decimal(n),
        "sequences": Decimal(len(sequences)),
    }
    for prefix, weights in (("", w), ("seq_", [weight(x) for x in total])):
        high = Decimal(sum(x > limit for x in weights)) / len(weights)
        values |= {
            f"{prefix}tis_weight_mean": _mean([min(x, limit) for x in weights]),
            f"{prefix}tis_clip_fraction": high,
            f"{prefix}mis_weight_mean": _mean([x if x <= limit else Decimal(0) for x in weights]),
            f"{prefix}mis_mask_fraction": high,
        }
    if n > 1:
        values["rollout_probs_diff_std"] = (_variance(difference) * n / (n - 1)).sqrt()
        spread = _variance(p) * _variance(q)
        if spread > 0:
            mean_p, mean_q = _mean(p), _mean(q)
            product = _mean([(a - mean_p) * (b - mean_q) for a, b in zip(p, q, strict=True)])
            values["rollout_actor_probs_pearson_corr"] = product / spread.sqrt()
    return values


# --- Helpers ------------------------------------------------------------------------------------


def measure(
    rollout: Tensor, train: Tensor, mask: Tensor | None = None, **kwargs: object
) -> dict[str, float]:
    metric = TrainingInferenceMismatch(**kwargs)
    metric.update(rollout, train, mask)
    return floats(metric)


def floats(metric: TrainingInferenceMismatch) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def logprobs(sigma: float, shape: tuple[int, int] = (6, 40)) -> tuple[Tensor, Tensor]:
    """Those of a rollout, and of training with log-ratios of this standard deviation."""
    rollout = -torch.rand(shape, dtype=torch.float64) * 4 - 1e-3
    return rollout, (rollout + sigma * torch.randn(shape, dtype=torch.float64)).clamp(max=0)


def assert_same(found: dict[str, float], expected: dict[str, float], rel: float = 1e-12) -> None:
    """To `rel`, relative to what is summed: signed means may cancel."""
    size = expected.get("logprob_abs_diff_mean", 0.0)
    for name, value in expected.items():
        same = found[name] == pytest.approx(value, rel=rel, abs=rel * size, nan_ok=True)
        assert same, (name, found[name], value)


# --- Tests --------------------------------------------------------------------------------------


class TestValues:
    @pytest.mark.parametrize("sigma", [1e-7, 1e-5, 1e-3, 0.1, 3.0])
    def test_to_twelve_digits(self, sigma: float) -> None:
        rollout, train = logprobs(sigma)
        found, expected = measure(rollout, train), exact(rollout, train)
        assert found.keys() - expected.keys() == {
            "nonfinite",
            *(f"logprob_abs_diff_{name}" for name in QUANTILES),
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-12, abs=0), name

    def test_where_the_usual_form_turns_negative(self) -> None:
        rollout = -torch.rand(8, 512)
        train = rollout + 1e-5 * torch.randn(8, 512)
        r = train - rollout
        assert (r.exp() - r - 1).mean() < 0  # in fp32
        found = measure(rollout, train, validate_args=False)
        assert found["k3_kl"] == pytest.approx(r.double().square().mean().item() / 2, rel=1e-4)

    def test_equal_sides(self) -> None:
        rollout, _ = logprobs(0)
        found = measure(rollout, rollout.clone())
        zero = {"kl", "k3_kl", "chi2_token", "chi2_seq", "logprob_abs_diff_p99.9"}
        one = {"ppl_ratio", "rollout_is_min", "rollout_is_max", "rollout_is_eff_sample_size"}
        assert {found[name] for name in zero} == {0}
        assert {found[name] for name in one} == {1}

    def test_extreme_disagreement(self) -> None:
        rollout = torch.tensor([[0.99, 0.95, 0.5, 0.04]]).log()
        train = torch.tensor([[0.01, 0.06, 0.5, 0.95]]).log()
        assert measure(rollout, train)["extreme_disagreement"] == 0.5

    def test_log_ratios_beyond_the_range_of_exp(self) -> None:
        rollout, train = torch.tensor([[-1.0, -5000.0]]), torch.tensor([[-5000.0, -1.0]])
        found = measure(rollout, train)
        assert found["k3_kl"] == math.inf
        assert found["rollout_is_max"] == pytest.approx(math.exp(20))
        assert found["rollout_probs_diff_max"] == pytest.approx(math.exp(-1))
        assert not any(math.isnan(value) for value in found.values())

    def test_confident_policy_keeps_its_correlation(self) -> None:
        """The spread of the probabilities is 1e-8 of their mean."""
        rollout = -1e-8 * torch.rand(4, 64, dtype=torch.float64)
        train = rollout * (1 + 0.1 * torch.randn(4, 64, dtype=torch.float64))
        name = "rollout_actor_probs_pearson_corr"
        # what is left of them when exp(logprob) is rounded to float64
        assert measure(rollout, train)[name] == pytest.approx(exact(rollout, train)[name], rel=1e-7)

    @pytest.mark.parametrize("sigma", [1e-9, 1e-4, 0.3])
    def test_quantiles_within_their_bin(self, sigma: float) -> None:
        rollout, train = logprobs(sigma, (50, 200))
        size = (train - rollout).abs().flatten().sort().values
        found = measure(rollout, train)
        for name, share in QUANTILES.items():
            expected = size[math.ceil(share * len(size)) - 1].item()
            assert found[f"logprob_abs_diff_{name}"] == pytest.approx(expected, rel=0.0055)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_small_dtypes_are_taken_as_they_are(self, dtype: torch.dtype) -> None:
        rollout, train = (x.to(dtype) for x in logprobs(0.1))
        assert_same(measure(rollout, train), exact(rollout, train))


class TestMask:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
    def test_what_is_masked_may_be_anything(self, dtype: torch.dtype) -> None:
        rollout, train = logprobs(0.2)
        mask = torch.rand(rollout.shape) < 0.6
        mask[2] = False
        expected = exact(rollout, train, mask)
        assert expected["sequences"] == 5
        padding = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).repeat(6, 10)
        rollout, train = (torch.where(mask, x, padding.double()) for x in (rollout, train))
        assert_same(measure(rollout, train, mask.to(dtype)), expected)

    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
    def test_no_token(self, shape: tuple[int, int]) -> None:
        x = torch.zeros(shape)
        found = measure(x, x, torch.zeros(shape))
        counts = {"tokens", "sequences", "nonfinite"}
        assert {found[name] for name in counts} == {0}
        assert all(math.isnan(found[name]) for name in found.keys() - counts)

    def test_no_token_changes_nothing(self) -> None:
        rollout, train = logprobs(0.2)
        metric = TrainingInferenceMismatch()
        metric.update(rollout, train)
        before = floats(metric)
        metric.update(rollout, train, torch.zeros_like(train))
        metric.update(rollout[:0], train[:0])
        assert floats(metric) == before

    def test_one_token(self) -> None:
        found = measure(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
        assert found["kl"] == 0.5
        assert math.isnan(found["rollout_probs_diff_std"])


class TestNotFinite:
    @pytest.mark.parametrize("q", [-math.inf, math.nan, -1.0])
    @pytest.mark.parametrize("p", [-math.inf, math.nan])
    def test_on_one_side_or_both(self, q: float, p: float) -> None:
        clean = (torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.1, -1.9]]))
        for order in (1, -1):
            pair = torch.tensor([[q]]), torch.tensor([[p]])
            rollout, train = (
                torch.cat([x, y], dim=1) for x, y in zip(clean, pair[::order], strict=True)
            )
            found = measure(rollout, train)
            assert found == measure(*clean) | {"nonfinite": 1}

    def test_a_sequence_of_them_is_none(self) -> None:
        rollout = torch.tensor([[-1.0, -2.0], [-math.inf, math.nan]])
        found = measure(rollout, torch.full((2, 2), -1.0))
        assert (found["tokens"], found["sequences"], found["nonfinite"]) == (2, 1, 2)
        assert found["rollout_log_ppl"] == 1.5


class TestMerging:
    def test_two_ranks_are_one_pass(self, tmp_path: Path) -> None:
        run_on_two_ranks("tests.metrics.ranks", tmp_path)

        whole = TrainingInferenceMismatch()
        for batch in batches():
            whole.update(*batch)
        for rank in range(2):
            found = torch.load(tmp_path / f"rank{rank}.pt")
            assert found.keys() == whole.compute().keys()
            assert_same({name: value.item() for name, value in found.items()}, floats(whole))

    def test_merge_state_and_forward(self) -> None:
        parts = batches()
        whole, merged, called = (TrainingInferenceMismatch() for _ in range(3))
        for index, part in enumerate(parts):
            whole.update(*part)
            other = TrainingInferenceMismatch() if index else merged
            other.update(*part)
            if index:
                merged.merge_state(other)
            alone = {name: value.item() for name, value in called(*part).items()}
            assert_same(alone, exact(*part))
        assert_same(floats(merged), floats(whole))
        assert_same(floats(called), floats(whole))

    def test_saved_and_loaded_in_between(self) -> None:
        first, second, third = batches()
        whole, saved, loaded = (TrainingInferenceMismatch() for _ in range(3))
        for batch in (first, second, third):
            whole.update(*batch)
        for metric in (saved, loaded):
            metric.persistent(True)
        saved.update(*first)
        saved.update(*second)
        loaded.load_state_dict(saved.state_dict())
        loaded.update(*third)
        assert floats(loaded) == floats(whole)

    def test_reset(self) -> None:
        first, second, _ = batches()
        metric = TrainingInferenceMismatch()
        metric.update(*first)
        metric.reset()
        metric.update(*second)
        assert floats(metric) == measure(*second)


values = st.one_of(
    st.floats(-30, -1e-6),
    st.floats(-1e-3, -1e-6),
    st.sampled_from([-math.inf, math.nan, -0.0, -1.0]),
)
tokens = st.tuples(values, st.one_of(values, st.floats(1e-9, 1e-4)), st.booleans())


class TestLaws:
    @given(st.lists(tokens, min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 12))
    @settings(max_examples=100, deadline=None)
    def test_any_tokens_in_any_parts(
        self, drawn: list[tuple[float, float, bool]], rows: int, cut: int
    ) -> None:
        drawn = drawn * rows
        shape = (rows, -1)
        columns = (torch.tensor(column, dtype=torch.float64) for column in zip(*drawn, strict=True))
        rollout, train, mask = (column.view(shape) for column in columns)
        train = torch.where(train > 0, (rollout + train).clamp(max=0), train)
        metric = TrainingInferenceMismatch()
        for part in (slice(cut % (rows + 1)), slice(cut % (rows + 1), None)):
            metric.update(rollout[part], train[part], mask[part])
        counted = mask.bool() & (train - rollout).isfinite()
        if not counted.any():
            assert metric.compute()["tokens"] == 0
            return
        found, expected = floats(metric), exact(rollout, train, mask)
        # as good as exp(logprob) is, whose spread may be that of its rounding
        expected.pop("rollout_actor_probs_pearson_corr", None)
        assert_same(found, expected, rel=1e-10)
        assert found["k3_kl"] >= 0
        assert found["js_divergence"] >= 0
        assert found["logprob_abs_diff_p50"] <= found["logprob_abs_diff_p99"]


class TestAliases:
    @pytest.mark.parametrize("aliases", ALIASES)
    def test_are_a_mapping(self, aliases: str) -> None:
        rollout, train = logprobs(0.5)
        found, plain = measure(rollout, train, aliases=aliases), measure(rollout, train)
        names = ALIASES[aliases]
        assert found == plain | {alias: plain[name] for alias, name in names.items()}
        assert not names.keys() & plain.keys()

    def test_trl_truncates(self) -> None:
        rollout, train = logprobs(2.0)
        found = measure(rollout, train, aliases="trl")
        ratio = (train - rollout).exp().clamp(max=2)
        assert found["sampling/importance_sampling_ratio/mean"] == pytest.approx(ratio.mean())
        assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(2)

    def test_threshold(self) -> None:
        rollout, train = logprobs(2.0)
        ratio = (train - rollout).exp()
        found = measure(rollout, train, aliases="slime", threshold=5)
        assert found["tis_clipfrac"] == (ratio > 5).double().mean() > 0
        assert found["tis_weight_mean"] == pytest.approx(ratio.clamp(max=5).mean())


class TestRefusals:
    x = torch.full((2, 3), -1.0)

    def test_shapes(self) -> None:
        metric = TrainingInferenceMismatch(validate_args=False)
        with pytest.raises(ValueError, match=r"train_logprobs must have the shape .*\(2, 3\), got"):
            metric.update(self.x, self.x[:, :2])
        with pytest.raises(ValueError, match=r"mask must have the shape"):
            metric.update(self.x, self.x, torch.ones(2, 1))
        with pytest.raises(ValueError, match=r"must be \[batch, tokens\], got shape \(3,\)"):
            metric.update(self.x[0], self.x[0])
        with pytest.raises(ValueError, match=r"must be floating-point, got torch.int64"):
            metric.update(self.x.long(), self.x)

    @pytest.mark.parametrize("rollout_has_them", [True, False])
    def test_probabilities(self, rollout_has_them: bool) -> None:
        pair = (self.x.exp(), self.x) if rollout_has_them else (self.x, self.x.exp())
        metric = TrainingInferenceMismatch()
        metric.update(self.x, self.x)
        with pytest.raises(ValueError, match=r"must be log-probabilities, .* got 0\.3679"):
            metric.update(*pair)
        assert metric.compute()["tokens"] == 6

    def test_late_where_update_must_not_wait(self) -> None:
        unchecked, metric = (
            TrainingInferenceMismatch(validate_args=False),
            TrainingInferenceMismatch(),
        )
        unchecked.update(self.x.exp(), self.x)
        assert unchecked.compute()["tokens"] == 6
        metric.merge_state(unchecked)
        metric.update(self.x, self.x)
        with pytest.raises(ValueError, match=r"log-probabilities, .* got 6 values above it"):
            metric.compute()

    def test_rounding_is_no_error(self) -> None:
        assert measure(self.x, torch.full((2, 3), 1e-4))["tokens"] == 6

    def test_options(self) -> None:
        with pytest.raises(ValueError, match=r"aliases must be one of 'verl', .*, got 'vllm'"):
            TrainingInferenceMismatch("vllm")
        for threshold in (1, 0, -2, math.nan):
            with pytest.raises(ValueError, match=r"threshold must be (above 1|a number), got"):
                TrainingInferenceMismatch(threshold=threshold)


class TestAsMetric:
    @pytest.mark.parametrize("validate_args", [True, False])
    def test_update_reads_nothing_back(self, validate_args: bool) -> None:
        """Tensors on the meta device have no values: whatever asks for one raises."""
        metric = TrainingInferenceMismatch(validate_args=validate_args).to("meta")
        x = torch.empty(4, 16, device="meta")
        metric.update(x, x, torch.empty(4, 16, device="meta", dtype=torch.bool))
        assert metric.token_sums.is_meta

    def test_states_stay_float64(self) -> None:
        rollout, train = logprobs(1e-5)
        metric = TrainingInferenceMismatch()
        metric.update(rollout, train)
        before = floats(metric)
        module = torch.nn.Module()
        module.metric = metric
        module.to(torch.bfloat16)
        module.half()
        assert floats(metric) == before
        assert metric.reset() is None
        assert metric.token_sums.dtype == torch.float64

    def test_keeps_no_graph(self) -> None:
        rollout, train = logprobs(0.1)
        metric = TrainingInferenceMismatch()
        assert not metric(rollout, train.requires_grad_())["kl"].requires_grad

    def test_updates_from_inference_mode_go_on(self) -> None:
        first, second, _ = batches()
        metric = TrainingInferenceMismatch()
        with torch.inference_mode():
            metric.update(*first)
        metric.update(*second)
        assert metric.compute()["tokens"] == first[2].sum() + second[2].sum()
