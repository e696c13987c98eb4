"""What a plan is predicted to gain on a card, and what would gain more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lightning_fp.cli.loading import UserModel
from lightning_fp.kernels.cost.data_sheets import DATA_SHEETS, DataSheet, Hardware
from lightning_fp.kernels.cost.grouped import FEWEST_ROWS, GROUPED_SHARE
from lightning_fp.kernels.cost.linear import TOKENS
from lightning_fp.layers import ConversionReport, LinearFormat, linear_format
from lightning_fp.layers.conversion.prediction import EXPLAINED, Prediction, predict
from lightning_fp.layers.conversion.work import Work, example_work, guessed_input
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.terminal import FittedTable

COMPILE_SECONDS = 5.0
"""Of one block in one pattern of formats; others like it cost next to nothing. Measured on a CPU
with small blocks: on a card, with Triton to compile as well, it is more."""

WORTH_WHILE = 0.005
"""A gain below this is called none: the model is not that exact."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A prediction, with what was assumed for it."""

    hardware: Hardware
    devices: int
    gathers_fp8: bool
    found: Prediction
    assumptions: tuple[str, ...]
    alternatives: tuple[tuple[str, float], ...]
    """What could be otherwise, and the speed-up end to end then, the best first."""

    compile_seconds: float
    kept: tuple[float, float]
    """Bytes of a micro-batch that the linear layers keep for backward, in bf16 and as planned."""

    @property
    def card(self) -> DataSheet:
        """What it is for."""
        return DATA_SHEETS[self.hardware]

    @property
    def _layers(self) -> str:
        experts = any(layer.experts for layer in self.found.layers.values())
        return "linear layers and experts" if experts else "linear layers"

    @property
    def losing(self) -> list[str]:
        """The layers that would be faster in bf16."""
        return [name for name, layer in self.found.layers.items() if layer.loses]

    def to_dict(self, report: ConversionReport) -> dict[str, Any]:
        """The report as plain data, with the prediction in it."""
        plan = report.to_dict()
        for row in plan["layers"]:
            layer = self.found.layers.get(row["name"])
            row["predicted_speedup"] = None if layer is None else layer.speedup
            row["predicted_as_experts"] = 0 if layer is None else layer.experts
            row["flops"] = None if layer is None else layer.flops
            row["bytes"] = None if layer is None else layer.bytes
            row["bytes_bf16"] = None if layer is None else layer.bytes_bf16
        return plan | {
            "hardware": self.hardware,
            "tokens": self.found.tokens,
            "devices": self.devices,
            "predicted_speedup": self.found.speedup,
            "predicted_speedup_end_to_end": self.found.speedup_end_to_end,
            "leave_out": self.losing,
            "alternatives": [
                {"change": change, "predicted_speedup_end_to_end": gain}
                for change, gain in self.alternatives
            ],
            "predicted_memory": {
                "optimizer_bytes": self.found.optimizer_bytes,
                "kept_for_backward_bf16_bytes": self.kept[0],
                "kept_for_backward_bytes": self.kept[1],
                "card_bytes": self.card.memory,
            },
            "predicted_compile_seconds": self.compile_seconds,
            "assumptions": list(self.assumptions),
        }

    def show(self, screen: Console) -> None:
        """Print it below the plan."""
        self._show_layers(screen)
        for line in self._lines():
            screen.print(line, markup=False, soft_wrap=True)
        for line in self.assumptions:
            screen.print(f"  assumed: {line}", markup=False, soft_wrap=True, style="dim")

    def _show_layers(self, screen: Console) -> None:
        numbers = ("speed-up", "GB, bf16", "GB, planned", "TFLOP")
        grid = FittedTable("", "predicted", *numbers, right=numbers)
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, layer in self.found.layers.items():
            if layer.casting is not None:
                row = (layer.experts, layer.speedup, layer.bytes_bf16, layer.bytes, layer.flops)
                alike.setdefault((_pattern(name), *row), []).append(name)
        for (pattern, experts, speedup, before, after, flops), names in alike.items():
            which = names[0] if len(names) == 1 else str(pattern)
            grid.add_row(
                f"{which} ({experts} experts)" if experts else which,
                f"{speedup:.2f}",
                f"{before / 1e9:.2f}",
                f"{after / 1e9:.2f}",
                f"{flops / 1e12:.2f}",
            )
        if alike:
            screen.print(grid)

    def _lines(self) -> list[str]:
        where = f"{self.card.name}, {self.found.tokens:,} tokens of a micro-batch"
        devices = "device" if self.devices == 1 else "devices"
        lines = [
            f"Predicted for {self.devices} {devices}, {where}, compiled; nothing was measured:",
            f"  {self._layers}, forward and backward: {self.found.speedup:.2f} x bf16",
        ]
        whole = self.found.speedup_end_to_end
        if whole is None:
            lines.append("  end to end: unknown, since no forward could be counted")
        else:
            lines.append(f"  end to end: {whole:.2f} x bf16")
            if whole < 1 + WORTH_WHILE:
                lines.append("  not worth it for speed: train in bf16 here")
        if self.losing:
            names = fold_names(self.losing)
            more = f" and {len(names) - 4} more" if names[4:] else ""
            lines.append(f"  leave out, faster in bf16: {', '.join(names[:4])}{more}")
        before, after = self.kept
        lines.append(
            f"  memory: {before / 1e9:.1f} GB kept for backward by {self._layers} in bf16,"
            f" {after / 1e9:.1f} GB as planned; {self.found.optimizer_bytes / 1e9:.1f} GB of"
            f" weights, gradients and Adam's moments; the card has {self.card.memory / 1e9:.0f} GB"
        )
        lines.append(f"  compiling: {self.compile_seconds:.0f} s and more")
        lines += [f"  with {change}: {gain:.2f} x" for change, gain in self.alternatives]
        return lines


def outlook(
    user: UserModel,
    report: ConversionReport,
    hardware: Hardware,
    *,
    backend: str = "auto",
    tokens: int | None = None,
    devices: int = 1,
    fp8_all_gather: bool = False,
) -> Outlook:
    """Predict what a plan gains.

    Args:
        user: the model, converted, and an example of its input.
        report: of the conversion.
        hardware: what it trains on.
        backend: what multiplies.
        tokens: of a micro-batch; by default those of the example, or one sequence of `TOKENS`.
        devices: over which weights and state of the optimizer are sharded.
        fp8_all_gather: whether they gather weights in FP8, as FSDP2 does with one scale per tensor.

    Raises:
        ValueError: if `tokens` or `devices` is not positive.
    """
    for name, number in (("tokens", tokens), ("devices", devices)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be 1 or more, got {number}")
    if fp8_all_gather and devices == 1:
        raise ValueError("--fp8-all-gather must come with --devices 2 or more, got 1")
    work, about = _counted(user, tokens or TOKENS)
    card = DATA_SHEETS[hardware]
    formats = {
        name: linear_format(format) for name, format in report.precision_map.formats().items()
    }

    def found(**changes: Any) -> Prediction:
        how: dict[str, Any] = {
            "formats": formats,
            "tokens": tokens,
            "devices": devices,
            "fp8_all_gather": fp8_all_gather,
            "backend": backend,
        }
        return predict(user.model, card=card, work=work, **{**how, **changes})

    here = found()
    return Outlook(
        hardware=hardware,
        devices=devices,
        gathers_fp8=fp8_all_gather,
        found=here,
        assumptions=(about, *_assumptions(card, devices), *_of_experts(here)),
        alternatives=_alternatives(here, found, formats, devices, fp8_all_gather),
        compile_seconds=COMPILE_SECONDS * _patterns(formats),
        kept=_kept(here),
    )


def _counted(user: UserModel, tokens: int) -> tuple[Work | None, str]:
    """One forward of the example, or of a guess at one; and what to say of it."""
    if user.example_input is not None and not user.is_placeholder:
        try:
            work = example_work(user.model, user.example_input)
        except Exception:  # whatever a user's forward raises; the plan itself says so
            pass
        else:
            return work, "the example input is a micro-batch"
    try:
        work = example_work(user.model, guessed_input(user.model, tokens))
    except Exception:
        return None, f"each linear layer multiplies {tokens:,} tokens once: no forward ran"
    return work, f"a micro-batch is one sequence of {tokens:,} tokens, for lack of an example input"


def _assumptions(card: DataSheet, devices: int) -> tuple[str, ...]:
    said = [
        f"peaks and bandwidth of the data sheet ({card.source}); products reach"
        f" {card.bf16_efficiency:.0%} of it in bf16"
        + (f" and {card.fp8_efficiency:.0%} in FP8" if card.fp8 else "")
        + " where they are long",
        f"{1 - EXPLAINED:.0%} of a bf16 step is communication, launches and waits, which stay",
        "no activation is recomputed; the optimizer is Adam in float32",
    ]
    if card.fp8 is None:
        said.append("FP8 is emulated on this card")
    if card.assumed:
        said.append(card.assumed)
    if devices > 1:
        said.append("weights are sharded over all devices and gathered in bf16 (FSDP2)")
    return tuple(said)


def _of_experts(here: Prediction) -> tuple[str, ...]:
    """What is assumed of experts, where there are any."""
    experts = [layer for layer in here.layers.values() if layer.experts]
    if not experts:
        return ()
    said = (
        "all experts of a module see as many tokens; a grouped product reaches"
        f" {GROUPED_SHARE:.0%} of a single one (pytorch/ao#2490)",
    )
    cast = {layer.casting for layer in experts} - {None}
    apart = sorted(str(each) for each in cast if not here.card.multiplies_groups(str(each)))
    if apart and here.card.fp8 is not None:
        said += (
            "experts have no grouped product in this format here: one after the other, no gain",
        )
    if any(layer.casting and layer.tokens < FEWEST_ROWS * layer.experts for layer in experts):
        said += (
            f"no gain for experts of fewer than {FEWEST_ROWS} tokens: no public table shows one",
        )
    return said


def _alternatives(
    here: Prediction,
    found: Any,
    formats: Mapping[str, LinearFormat],
    devices: int,
    gathers_fp8: bool,
) -> tuple[tuple[str, float], ...]:
    """Other batches, formats and strategies whose prediction differs."""
    if here.speedup_end_to_end is None or not any(each.is_fp8 for each in formats.values()):
        return ()
    tried: dict[str, Prediction] = {
        f"{factor:g} x the tokens of a micro-batch": found(tokens=int(here.tokens * factor))
        for factor in (0.25, 4)
        if here.tokens * factor >= 1
    }
    for name in ("fp8-dynamic", "fp8-rowwise", "fp8-rowwise-gw-hp"):
        other = {
            layer: linear_format(name) if format.is_fp8 else format
            for layer, format in formats.items()
        }
        if other != formats and here.card.fp8 is not None:
            tried[name] = found(formats=other)
    losing = {name for name, layer in here.layers.items() if layer.loses}
    if losing:
        high = {
            layer: linear_format("bf16") if layer in losing else format
            for layer, format in formats.items()
        }
        tried["the losing layers in bf16"] = found(formats=high)
    if here.card.fp8 is not None and not gathers_fp8:
        many = max(devices, 8)
        tried[f"{many} devices and weights gathered in FP8 (FSDP2)"] = found(
            devices=many, fp8_all_gather=True
        )
    gains = [(change, each.speedup_end_to_end or 1.0) for change, each in tried.items()]
    return tuple(sorted(gains, key=lambda each: -each[1]))


def _patterns(formats: Mapping[str, LinearFormat]) -> int:
    """How many blocks differ in their layers' names or formats: each is compiled for itself."""
    blocks: dict[str, list[tuple[str, LinearFormat]]] = {}
    for name, format in formats.items():
        block = re.match(r".*?\d+(?=\.|$)", name)
        start = block[0] if block else ""
        blocks.setdefault(start, []).append((name[len(start) :], format))
    return len({tuple(each) for each in blocks.values()})


def _kept(found: Prediction) -> tuple[float, float]:
    """Bytes of the inputs of linear layers and experts, which backward needs."""
    before = after = 0.0
    for layer in found.layers.values():
        before += 2 * layer.inputs
        # Our kernel keeps the cast input; torchao's keeps the input itself, as all do of experts.
        cast = layer.casting in ("tensor", "tensor-fused") and not layer.experts
        after += layer.inputs * (1 if cast else 2)
    return before, after


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
