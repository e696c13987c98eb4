"""What watching costs: a step that collects statistics, and Trainer runs with the callbacks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from parts.card import Card
from parts.formats import converted
from parts.llama import make_llama, make_step
from parts.rows import Rows

LAYERS = 4


def measure(card: Card, rows: Rows) -> None:
    for format in ("fp8-delayed",) if card.small else ("fp8-delayed", "fp8-dynamic"):
        _sampled_steps(card, rows, format)
    _callbacks(card, rows)


def _sampled_steps(card: Card, rows: Rows, format: str) -> None:
    """Without Lightning: steps of the table's own statistics, beside plain ones."""
    from lightning_fp.layers.statistics_table import StatisticsTable

    model, shape = make_llama(card, LAYERS)
    table = converted(model, format)
    collected = StatisticsTable(table.layers)
    step = make_step(model, shape, card, table)

    def sampled() -> None:
        collected.collect(True)
        step()
        collected.fold()
        collected.collect(False)

    times = card.medians({"plain": step, "sampled": sampled}, seconds=4.0)
    interval = card.medians({"take": lambda: collected.take().cpu()})["take"]
    for name, seconds in times.items():
        ratio = seconds / times["plain"]
        note = f"ratio to a plain step, {LAYERS} blocks; one step in 16 is sampled"
        rows.add(f"{name} step, {format}, eager", seconds * 1e3, "ms", ratio=ratio, note=note)
    rows.add(f"statistics to the host, {format}", interval * 1e3, "ms", note="once per interval")


def _callbacks(card: Card, rows: Rows) -> None:
    """Whole Trainer runs, in turn; the ratio of their medians."""
    import lightning as L

    from lightning_fp import ClampMonitor, PrecisionFallback

    wanted: dict[str, Callable[[str], list[L.Callback]]] = {
        "no callback": lambda _: [],
        "ClampMonitor": lambda there: [ClampMonitor(dirpath=there)],
        "PrecisionFallback": lambda there: [PrecisionFallback(dirpath=there)],
    }
    times: dict[str, list[float]] = {name: [] for name in wanted}
    for turn in range(1 if card.small else 3):
        for name, make in wanted.items():
            with tempfile.TemporaryDirectory() as there:
                times[name].append(_trainer_seconds(card, make(there), there))
            median = statistics.median(times[name])
            rows.add(
                f"Trainer step, {name}, turn {turn + 1}",
                median * 1e3,
                "ms",
                ratio=median / statistics.median(times["no callback"]),
                note="ratio to the runs without callbacks, medians of the turns so far",
            )


def _trainer_seconds(card: Card, callbacks: list[Any], there: str) -> float:
    """Seconds per step of one run, after its first steps."""
    import lightning as L

    from lightning_fp import FP8Precision

    warm, counted = (1, 2) if card.small else (20, 64)
    llama, shape = make_llama(card, LAYERS)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.llama = llama

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            logits = self.llama(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == warm:
                card.synchronize()
                self.began = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            card.synchronize()
            self.seconds = (time.perf_counter() - self.began) / counted

    clock = Clock()
    tokens = torch.randint(shape.vocabulary, ((warm + counted) * 4, shape.context + 1))
    trainer = L.Trainer(
        accelerator="gpu" if card.device.type == "cuda" else "cpu",
        devices=1,
        max_steps=warm + counted,
        plugins=FP8Precision("delayed", base="bf16-true", layers={"*": "fp8-delayed"}),
        callbacks=[*callbacks, clock],
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=there,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(tokens, batch_size=4))
    return clock.seconds
