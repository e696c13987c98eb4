"""The demo's flow: BF16, FP8 with a flip and a checkpoint, another scaling, FP8 resumed."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from lightning_fp.callbacks import ClampMonitor
from lightning_fp.demo.callbacks import FlipLayer, Recorder, SaveCheckpoint
from lightning_fp.demo.clamping import worst_of
from lightning_fp.demo.data import ByteBatches, read_sources
from lightning_fp.demo.model import ByteGPT
from lightning_fp.demo.summary import DemoResult, RunResult, same, write
from lightning_fp.layers import linear_format
from lightning_fp.plugins import FP8Precision

FLIPPED_LAYER = "blocks.1.mlp.down"
VALIDATION_BATCHES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """What the demo trains, and where it writes."""

    output: Path = Path("runs/demo")
    """Directory for the losses, the summary and the checkpoint; files of an earlier demo in it
    are overwritten."""

    steps: int = 96
    """Optimizer steps of each run; at least 4."""

    scaling: str = "fp8-dynamic"
    """Format of the FP8 runs."""

    batch_size: int = 8
    """Sequences per step."""

    context: int = 64
    """Bytes per sequence; batch_size x context must be a multiple of 16 on a GPU."""

    seed: int = 0
    """Seed of weights and batches, the same for all runs."""

    def __post_init__(self) -> None:
        for field, least in (("steps", 4), ("batch_size", 1), ("context", 2), ("seed", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        format = linear_format(self.scaling)
        if format.is_high_precision:
            raise ValueError(
                f"scaling must be a low-precision format, got {self.scaling!r}; BF16 is what the"
                " demo compares with"
            )
        object.__setattr__(self, "scaling", format.name)

    @property
    def flips(self) -> dict[int, str]:
        """The flipped layer's formats by step: away from FP8 after a quarter, back after three."""
        return {self.steps // 4: "bf16", self.steps * 3 // 4: self.scaling}

    @property
    def other_scaling(self) -> str:
        """What the FP8 run is compared with: delayed scaling, or dynamic if it is delayed."""
        return "fp8-dynamic" if self.scaling == "fp8-delayed" else "fp8-delayed"

    def clamp_log(self, scaling: str) -> Path:
        """Where a run's statistics are."""
        return self.output / scaling

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint of the middle is."""
        return self.output / "middle.ckpt"


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Train four times, compare, and write everything to `options.output`.

    Args:
        options: see there.
        console: where progress goes.

    Returns:
        What happened.

    Raises:
        ValueError: if this Python has no sources to train on.
    """
    text, held_out = read_sources()
    options.output.mkdir(parents=True, exist_ok=True)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if accelerator == "cuda" else "CPU"
    console.print(
        f"A byte-level GPT learns the standard library's sources ({len(text) / 1e6:.1f} MB), four"
        f" times from seed {options.seed}, on {device}."
    )
    if torch.backends.mps.is_available() and accelerator == "cpu":
        console.print("MPS has no float8 dtypes, so the demo takes the CPU.")

    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:11}"),
        TimeElapsedColumn(),
    )
    with quiet_lightning(), Progress(*columns, console=console) as progress:
        demo = _Demo(options, text, held_out, accelerator, progress)
        bf16 = demo.train("BF16", None)
        fp8 = demo.train(options.scaling, demo.plugin(options.scaling))
        other = demo.train(options.other_scaling, demo.plugin(options.other_scaling))
        resumed = demo.train(
            f"{options.scaling}, resumed", demo.plugin(options.scaling), resume=options.checkpoint
        )
    result = DemoResult(
        device=device,
        scaling=options.scaling,
        other_scaling=options.other_scaling,
        flipped=FLIPPED_LAYER,
        flips=options.flips,
        checkpoint=str(options.checkpoint),
        checkpoint_step=options.steps // 2,
        bf16=bf16,
        fp8=fp8,
        other=other,
        resumed=resumed,
        resume_is_exact=same(fp8, resumed),
        clamping=tuple(
            worst_of(scaling, options.clamp_log(scaling))
            for scaling in (options.scaling, options.other_scaling)
        ),
    )
    write(result, options.output)
    return result


@dataclass(frozen=True)
class _Demo:
    """What the runs share."""

    options: DemoOptions
    text: Tensor
    held_out: Tensor
    accelerator: str
    progress: Progress

    def plugin(self, scaling: str) -> FP8Precision:
        """FP8 in every block.

        The blocks are named by a rule, because on FP8 hardware the defaults leave layers of this
        size in BF16: they are too small to gain.
        """
        return FP8Precision(scaling, layers={"blocks.*": scaling})

    def train(
        self, title: str, plugin: FP8Precision | None, *, resume: Path | None = None
    ) -> RunResult:
        """One run; the FP8 run leaves the checkpoint that the resumed one continues.

        ClampMonitor watches all FP8 runs but the resumed one, which must end alike without it.
        """
        options = self.options
        if not self.progress.console.is_terminal:  # no bars there until all is done
            self.progress.console.print(f"{title}: {options.steps} steps")
        recorder = Recorder(self.progress, title, options.steps)
        callbacks: list[L.Callback] = [recorder]
        if plugin is not None and resume is None:
            shutil.rmtree(options.clamp_log(title), ignore_errors=True)  # of an earlier demo
            callbacks.append(ClampMonitor(dirpath=options.clamp_log(title), log_every_n_steps=16))
        if plugin is not None and title != options.other_scaling:
            callbacks.append(FlipLayer(plugin, FLIPPED_LAYER, options.flips))
        if title == options.scaling:
            callbacks.append(SaveCheckpoint(options.steps // 2, options.checkpoint))

        L.seed_everything(options.seed)
        model = ByteGPT(context=options.context)
        trainer = L.Trainer(
            accelerator=self.accelerator,
            devices=1,
            max_epochs=1,
            precision="bf16-mixed" if plugin is None else None,
            plugins=plugin,
            callbacks=callbacks,
            deterministic=self.accelerator == "cuda",
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            model,
            self._batches(self.text, options.steps),
            self._batches(self.held_out, VALIDATION_BATCHES),
            ckpt_path=resume,
        )
        return RunResult(
            losses=recorder.losses,
            validation_loss=recorder.validation_loss,
            seconds_per_step=recorder.seconds_per_step,
            report=None if plugin is None else plugin.report,
            formats={} if plugin is None else plugin.precision_map.formats(),
            weights=model.state_dict(),
            optimizer=trainer.optimizers[0].state_dict(),
        )

    def _batches(self, text: Tensor, batches: int) -> ByteBatches:
        return ByteBatches(
            text,
            batches=batches,
            batch_size=self.options.batch_size,
            context=self.options.context,
            seed=self.options.seed,
        )


@contextmanager
def quiet_lightning() -> Generator[None, None, None]:
    """Keep Lightning's notes and tips about devices, workers and directories out of the output."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
