"""Stage: a part of a rollout, with the formats that it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, cast, get_args

from lightning_fp.argument_types import pythons_own
from lightning_fp.choices import check_choice, did_you_mean
from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.layers.format import DynamicScaling
from lightning_fp.recipes.blocks import check_pattern
from lightning_fp.recipes.gate import Gate, is_count, is_number
from lightning_fp.shown import shown

CONFIGURED = "configured"
"""Stands for the format that the precision plugin was configured to give a layer."""

OnFail = Literal["hold", "step_back", "stop"]


class Until(TypedDict, total=False):
    """When a stage has lasted long enough: all that is given must be reached."""

    steps: int
    """Optimizer steps in the stage; those in which it was held do not count."""

    tokens: int
    """Training tokens of the whole run so far."""

    share: float
    """Share of the whole run's steps, above 0 and up to 1."""

    loss: float
    """The mean training loss of the last 50 steps is below this."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Which layers run in which format, until when, and what must hold before it goes on."""

    name: str

    layers: Mapping[str, str]
    """Formats by pattern, first match wins; what no pattern matches keeps the format it has. A
    pattern is a glob over the whole layer name, a regular expression after "re:", or blocks:
    "blocks[0]", "blocks[1:-1]", "blocks[25%:75%].mlp.*". A format is "high", "configured" (what
    the precision plugin gives the layer), or the name of one."""

    until: Until = field(default_factory=lambda: Until())
    """When the stage has lasted long enough. Without it, and without gates, it goes on for ever."""

    gates: tuple[Gate, ...] = ()
    """What must hold before the next stage begins; with "step_back" and "stop", at every step."""

    on_fail: OnFail = "hold"
    """What a gate that fails does: "hold" waits in the stage until it passes, "step_back" returns
    to the stage before and tries again later, "stop" ends the rollout where it stands."""

    max_tries: int = 3
    """With "step_back": how often the stage is tried before the rollout stays in the one before."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"stage: name must be a text, got {shown(self.name)}")
        object.__setattr__(self, "layers", self._checked_layers())
        object.__setattr__(self, "until", self._checked_until())
        if not isinstance(self.gates, (tuple, list)):
            raise ValueError(f"{self}: gates must be a list, got {shown(self.gates)}")
        for gate in self.gates:
            if not isinstance(gate, Gate):
                raise ValueError(f"{self}: gates must be Gates, got {shown(gate)}")
        object.__setattr__(self, "gates", tuple(self.gates))
        twice = [gate for i, gate in enumerate(self.gates) if gate in self.gates[:i]]
        if twice:
            raise ValueError(f"{self}: gates: {twice[0]} is given twice")
        check_choice(f"{self}: on_fail", self.on_fail, get_args(OnFail))
        if self.on_fail != "hold" and not self.gates:
            raise ValueError(
                f"{self}: on_fail must be 'hold' without gates, got {self.on_fail!r}; add a gate"
            )
        object.__setattr__(self, "max_tries", pythons_own(self.max_tries))
        if not is_count(self.max_tries):
            raise ValueError(
                f"{self}: max_tries must be an integer of at least 1, got {shown(self.max_tries)}"
            )

    def __str__(self) -> str:
        return f"stage {self.name!r}"

    @property
    def is_open_ended(self) -> bool:
        """Whether nothing ends it but the end of the run."""
        return not self.until and not self.gates

    @property
    def window(self) -> int:
        """The longest window of its gates, in steps."""
        return max((gate.window for gate in self.gates), default=1)

    def _checked_layers(self) -> dict[str, str]:
        layers: Any = self.layers
        if not isinstance(layers, Mapping):
            raise ValueError(
                f"{self}: layers must be a mapping {{pattern: format}}, got {shown(layers)};"
                " e.g. {'*': 'configured'}"
            )
        if not layers:
            raise ValueError(
                f"{self}: layers must have at least one pattern, got none; e.g. {{'*': 'high'}}"
            )
        checked: dict[str, str] = {}
        for pattern, format in layers.items():
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"{self}: layers: {error}") from error
            if "*" in checked:
                raise ValueError(
                    f"{self}: layers: pattern {pattern!r} never applies after '*', which matches"
                    " every layer; put it before"
                )
            checked[pattern] = self._checked_format(pattern, format)
        return checked

    def _checked_format(self, pattern: str, format: object) -> str:
        if format == CONFIGURED:
            return CONFIGURED
        where = f"{self}: layers[{pattern!r}]"
        if not isinstance(format, (str, LinearFormat, DynamicScaling)):
            raise ValueError(f"{where}: format must be a name, got {shown(format)}")
        try:
            return linear_format(format).name
        except ValueError as error:
            raise ValueError(f"{where}: {error}, or {CONFIGURED!r}") from error

    def _checked_until(self) -> Until:
        until: Any = self.until
        known = Until.__annotations__
        if not isinstance(until, Mapping):
            raise ValueError(
                f"{self}: until must be a mapping of {', '.join(known)}, got {shown(until)};"
                " e.g. {'steps': 500}"
            )
        until = {key: pythons_own(value) for key, value in until.items()}
        for key, value in until.items():
            where = f"{self}: until.{key}"
            if key not in known:
                hint = did_you_mean(key, known)
                raise ValueError(f"{where} is not known; until has {', '.join(known)}{hint}")
            if key in ("steps", "tokens") and not is_count(value):
                raise ValueError(f"{where} must be an integer of at least 1, got {shown(value)}")
            if key == "share" and not (is_number(value) and 0 < value <= 1):
                raise ValueError(f"{where} must be above 0 and at most 1, got {shown(value)}")
            if key == "loss" and not is_number(value):
                raise ValueError(f"{where} must be a finite number, got {shown(value)}")
        return cast(Until, until)
