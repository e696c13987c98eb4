"""ConversionReport: what a conversion did to each layer, and why not to the others."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_fp.counting import counted
from lightning_fp.kernels.padding import WORTH_SAYING, padded_share
from lightning_fp.layers.conversion.flops import ITSELF
from lightning_fp.layers.format import HIGH_PRECISION
from lightning_fp.layers.layer_names import fold_names

if TYPE_CHECKING:
    from lightning_fp.layers.precision_map import PrecisionMap


REPLACED = "replaced or removed after the conversion"
"""Why a layer is not converted any more."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer of the report."""

    name: str
    """The layer's name, as in `named_modules()`."""

    format: str
    """The format it multiplies in."""

    kernel: str
    """What multiplies it."""

    parameters: int
    """Weight and bias elements."""

    flops_share: float
    """Share of the model's FLOPs, 0 to 1; 0 where unknown (a convolution without an example)."""

    reason: str | None
    """Why it is in high precision; None if it was converted."""

    experts: int = 0
    """How many experts it is; 0 for a linear layer."""

    padding: float = 0.0
    """Share of its FLOPs, forward and backward, that FP8 hardware spends on zeros which fill up
    blocks of tokens, 0 to 1; 0 where that was not measured."""

    @property
    def title(self) -> str:
        """The name, also for a model that is a single layer."""
        return self.name or "(the model itself)"

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        data = dataclasses.asdict(self)
        return data if self.experts else {k: v for k, v in data.items() if k != "experts"}


def _share(row: LayerReport, flops: Mapping[str, int]) -> float:
    return flops.get(row.name or ITSELF, 0) / flops[""] if flops.get("") else 0.0


def padding_of(layers: Iterable[LayerReport]) -> float:
    """Share of these layers' FLOPs that FP8 hardware spends on zeros, 0 to 1."""
    zeros = flops = 0.0
    for layer in layers:
        flops += layer.flops_share
        zeros += layer.flops_share * layer.padding / (1 - layer.padding)
    return padded_share(zeros, flops)


def _about_experts(count: int) -> str:
    return f" ({counted(count, 'group')} of experts among them)" if count else ""


def _some(titles: list[str]) -> str:
    names = fold_names(titles)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` did. Prints as the table a user reads at the start of a run."""

    layers: list[LayerReport]
    """Every module that multiplies by Parameters of its own, in the order of the model."""

    measured: bool
    """Whether FLOPs were counted in a forward, attention and convolutions included; otherwise
    `flops_share` is a share of the linear layers' FLOPs."""

    parameters: int = 0
    """Elements of all Parameters of the model."""

    order: tuple[str, ...] = ()
    """The layers in the order in which they ran, where that was measured."""

    stored: tuple[str, ...] = ()
    """The frozen layers of which only FP8 weights are kept."""

    saved_bytes: int = 0
    """What these take less of memory."""

    frozen_kept: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """The frozen layers in FP8 that keep their weight though it was to be stored, and why."""

    attention: str = ""
    """The simulated format of attention's products; "" for none."""

    precision_map: PrecisionMap = dataclasses.field(repr=False, compare=False)
    """The table itself, to change formats later."""

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that run in low precision."""
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def flops_share(self) -> float:
        """Share of FLOPs that run in low precision, 0 to 1."""
        return sum(layer.flops_share for layer in self.converted)

    @property
    def padding(self) -> float:
        """Share of the low-precision layers' FLOPs that FP8 hardware spends on zeros, 0 to 1."""
        return padding_of(self.converted)

    def with_flops(
        self, flops: Mapping[str, int], padding: Mapping[str, float] | None = None
    ) -> ConversionReport:
        """The same report with shares of measured FLOPs; without what multiplied nothing.

        Args:
            flops: FLOPs by layer name, the whole model under "".
            padding: see `LayerReport.padding`, by layer name.
        """
        if not flops.get("", 0):
            return self
        order = tuple(name for name in flops if name)
        measured = dataclasses.replace(self.with_shares(flops), measured=True, order=order)
        ran = [
            dataclasses.replace(row, padding=(padding or {}).get(row.name, 0.0))
            for row in measured.layers
            if row.flops_share or row.format != "not linear"
        ]
        return dataclasses.replace(measured, layers=ran)

    def without(self, names: Collection[str]) -> ConversionReport:
        """The same report after layers were replaced.

        Args:
            names: of these layers; none of them is converted any more.
        """
        high = {"format": "high", "reason": REPLACED}
        rows = [dataclasses.replace(r, **high) if r.name in names else r for r in self.layers]
        return dataclasses.replace(self, layers=rows)

    def with_shares(self, flops: Mapping[str, int]) -> ConversionReport:
        """The same report with other shares; see `with_flops`."""
        layers = [dataclasses.replace(row, flops_share=_share(row, flops)) for row in self.layers]
        return dataclasses.replace(self, layers=layers)

    @property
    def linear_parameters(self) -> float:
        """Share of the model's parameters that lie in linear layers, 0 to 1."""
        linear = sum(row.parameters for row in self.layers if row.format != "not linear")
        return linear / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "flops_share": self.flops_share,
            "measured": self.measured,
            "padding": self.padding,
            "stored": list(self.stored),
            "saved_bytes": self.saved_bytes,
            **({"attention": self.attention} if self.attention else {}),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """A few lines: what runs in which format and kernel, and what was left alone and why."""
        linear = [layer for layer in self.layers if layer.format != "not linear"]
        experts = sum(layer.experts > 0 for layer in self.converted)
        these = "its linear layers' and experts'" if experts else "its linear layers'"
        what = "the model's FLOPs" if self.measured else f"{these} FLOPs"
        unknown = [layer for layer in self.converted if layer.experts and not layer.flops_share]
        if unknown and not self.measured:
            what += f" without those of {_some([layer.title for layer in unknown])}, which an"
            what += " example_input tells"
        elif not self.measured and len(linear) < len(self.layers):
            what += f", which hold {self.linear_parameters:.0%} of its parameters"
        lines = [
            f"{len(self.converted)} of {len(linear)} {'layers' if experts else 'linear layers'}"
            f" in low precision{_about_experts(experts)},"
            f" {self.flops_share:.1%} of {what}"
        ]
        by_kernel: dict[tuple[str, str], int] = defaultdict(int)
        for layer in self.converted:
            by_kernel[layer.format, layer.kernel] += 1
        for (format, kernel), count in by_kernel.items():
            layers = "layer" if count == 1 else "layers"
            lines.append(f"  {format}: {count} {layers}, kernel {kernel}")
        if self.padding > WORTH_SAYING:
            most = max(self.converted, key=lambda layer: layer.padding)
            lines.append(
                f"  zeros that fill up blocks of tokens: {self.padding:.1%} of their FLOPs,"
                f" {most.padding:.1%} in {most.title}, with the example's tokens"
            )
        if self.attention:
            lines.append(f"  {self.attention}: attention's products, kernel simulated")
        lines += self._about_stored()
        by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
        for layer in self.layers:
            if layer.reason is not None:
                by_reason[layer.format, layer.reason].append(layer.title)
        for (format, reason), titles in by_reason.items():
            shown = _some(titles)
            where = "left alone"
            if format in HIGH_PRECISION:
                where = "left in high precision" if format == "high" else f"left in {format}"
            lines.append(f"  {where}: {shown} ({reason})")
        return "\n".join(lines)

    def _about_stored(self) -> list[str]:
        lines: list[str] = []
        if self.stored:
            who = "layers keep only their" if len(self.stored) > 1 else "layer keeps only its"
            saved = f"{self.saved_bytes / 1e6:.1f} MB less"
            lines.append(f"  {len(self.stored)} frozen {who} FP8 weight: {saved}")
        for reason in dict.fromkeys(self.frozen_kept.values()):
            names = [name for name, why in self.frozen_kept.items() if why == reason]
            lines.append(f"  frozen, but kept whole: {_some(names)} ({reason})")
        return lines

    def screen(self, who: str, *, width: int = 80, most: int = 12) -> str:
        """The summary as a console has it at the start of a run.

        Args:
            who: the plugin, before the first line.
            width: lines break between words where they would be longer.
            most: lines in all.
        """
        first, *rest = self.summary().splitlines()
        told, lines = [f"{who}: {first}", *rest], list[str]()
        wrapper = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False)
        wrapper.break_on_hyphens = False
        for index, line in enumerate(told):
            wrapped = wrapper.wrap(line)
            last = index + 1 == len(told)
            if len(lines) + len(wrapped) > (most if last else most - 1):
                lines.append(f"  and {len(told) - index} more: print(plugin.report)")
                break
            lines += wrapped
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()
