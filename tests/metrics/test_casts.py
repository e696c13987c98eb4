"""ClampFraction, ClampedMass, UnderflowFraction and SQNR."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_fp.metrics import SQNR, ClampedMass, ClampFraction, UnderflowFraction

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
METRICS = (ClampFraction, ClampedMass, UnderflowFraction, SQNR)


def value(metric: type, x: Tensor, scale: Tensor | float = 1.0, dtype: torch.dtype = E4M3) -> float:
    instance = metric()
    instance.update(x, scale, dtype)
    return instance.compute().item()


class TestValues:
    def test_rounding_back_is_not_clamping(self) -> None:
        x = torch.tensor([464.0, 464.1, -500.0, 0.0])
        assert value(ClampFraction, x) == 0.5
        assert value(ClampFraction, torch.tensor([61439.0, 61440.0]), dtype=E5M2) == 0.5

    def test_mass_of_finite_elements(self) -> None:
        x = torch.tensor([548.0, -100.0, 352.0, math.inf, math.nan])
        assert value(ClampedMass, x) == 0.1

    def test_underflow_of_elements_that_are_not_zero(self) -> None:
        x = torch.tensor([0.0, -0.0, 2.0**-10, 2.0**-9, math.inf])
        assert value(UnderflowFraction, x) == 0.5

    @pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float16, torch.bfloat16])
    def test_sqnr_is_that_of_a_cast(self, dtype: torch.dtype) -> None:
        x = torch.randn(1000)
        error = x.to(dtype).float() - x
        expected = 10 * math.log10(x.square().sum() / error.square().sum())
        assert value(SQNR, x, dtype=dtype) == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(4), torch.tensor([math.nan])])
    def test_nothing_to_measure(self, x: Tensor) -> None:
        for metric in (ClampFraction, ClampedMass, UnderflowFraction):
            assert value(metric, x) == 0
        assert math.isnan(value(SQNR, x))

    def test_nothing_lost(self) -> None:
        assert value(SQNR, torch.tensor([1.0, 2.0])) == math.inf


class TestScale:
    x = torch.tensor([[1.0, 300.0], [300.0, 5.0]])

    @pytest.mark.parametrize("metric", METRICS)
    def test_number_tensor_and_expanded_tensor_are_the_same(self, metric: type) -> None:
        scales = (2.5, torch.tensor(2.5), torch.tensor([2.5]), torch.full((2, 2), 2.5))
        found = {value(metric, self.x, scale) for scale in scales}
        assert max(found) == pytest.approx(min(found), rel=1e-6)

    @pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
    def test_broadcasts(self, shape: tuple[int, int]) -> None:
        scale = torch.tensor([1.0, 2.0]).view(shape)
        expected = (self.x * scale > 464).float().mean()
        assert value(ClampFraction, self.x, scale) == expected > 0

    def test_any_shape(self) -> None:
        assert value(ClampFraction, torch.tensor(500.0)) == 1
        assert value(ClampFraction, torch.full((2, 3, 4), 500.0), torch.ones(3, 1)) == 1

    def test_that_does_not_broadcast(self) -> None:
        with pytest.raises(ValueError, match=r"scale must broadcast to the shape of x, \(2, 2\)"):
            value(ClampFraction, self.x, torch.ones(3))

    def test_unknown_dtype(self) -> None:
        with pytest.raises(ValueError, match="int8"):
            value(ClampFraction, self.x, dtype=torch.int8)


class TestAsMetrics:
    @pytest.mark.parametrize("metric", METRICS)
    def test_updates_and_ranks_add_up(self, metric: type) -> None:
        x = torch.randn(64) * 300
        ranks = [metric(), metric()]
        for instance, part in zip(ranks, x.chunk(2), strict=True):
            for piece in part.chunk(2):
                instance.update(piece, 1.0, E4M3)
        whole = metric()
        whole.update(x, 1.0, E4M3)
        # What torchmetrics does with the states of all ranks.
        assert whole._reductions["sums"].__name__ == "dim_zero_sum"
        ranks[0].sums = sum(instance.sums for instance in ranks)
        assert ranks[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_float64_state_survives_its_modules_dtype(self, dtype: torch.dtype) -> None:
        module = torch.nn.Module()
        module.metric = metric = ClampFraction()
        metric.update(torch.tensor([1.0, 500.0, 300.0]), 1.0, E4M3)
        module.to(dtype)
        assert metric.sums.dtype == torch.float64
        assert metric.compute().item() == 1 / 3
        metric.reset()
        assert metric.sums.dtype == torch.float64

    def test_follows_its_module_to_a_device(self) -> None:
        assert ClampFraction().to("meta").sums.device.type == "meta"

    def test_reset(self) -> None:
        metric = ClampFraction()
        metric.update(torch.tensor([500.0]), 1.0, E4M3)
        metric.reset()
        metric.update(torch.tensor([1.0]), 1.0, E4M3)
        assert metric.compute() == 0

    def test_which_way_is_better(self) -> None:
        assert [metric.higher_is_better for metric in METRICS] == [False, False, False, True]

    @pytest.mark.parametrize("metric", METRICS)
    def test_plot(self, metric: type) -> None:
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
        instance = metric()
        instance.update(torch.randn(64) * 300, 1.0, E4M3)
        figure, axis = instance.plot()
        assert axis.get_ylim()[0] < axis.get_ylim()[1]
        matplotlib.pyplot.close(figure)
