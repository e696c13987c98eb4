"""ThroughputMonitor measures against what the hardware can do in the run's formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.throughput import _CUDA_FLOPS
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision

from lightning_fp import FP8Precision, FP16Precision
from lightning_fp.plugins import throughput
from tests.helper import LanguageModel, make_trainer, text_loader

H100 = {torch.int8: 1979e12, torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}


@pytest.mark.parametrize(
    ("plugin", "dtype"),
    [
        (FP8Precision("delayed"), torch.int8),
        (FP8Precision("rowwise", base="32-true"), torch.int8),
        (FP8Precision(layers={"*": "bf16"}), torch.bfloat16),
        (FP8Precision("e8m3"), torch.bfloat16),  # simulated: no FP8 tensor core is used
        (FP16Precision(), torch.float16),
        (FP8Precision("fp32", base="32-true"), torch.float32),
    ],
)
def test_what_the_hardware_can_do(
    plugin: Precision, dtype: torch.dtype, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of Lightning's own table; there is no H100 here, whose column stands in."""
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, asked: H100[asked])
    monitor = ThroughputMonitor(batch_size_fn=len, window_size=2)
    trainer = make_trainer(
        plugin, max_steps=4, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=2
    )
    model = LanguageModel(blocks=1)
    model.flops_per_batch = 1e6
    trainer.fit(model, text_loader(40), text_loader(8))
    assert monitor.available_flops == H100[dtype]
    assert {t.available_flops for t in monitor._throughputs.values()} == {H100[dtype]}


def test_lightning_knows_these_dtypes() -> None:
    assert {throughput.FP8_PEAK, *throughput.PEAK.values()} <= _CUDA_FLOPS["h100 sxm"].keys()
