"""Loss scaling for FP16: keeps small gradients above underflow and large ones below overflow.

The loss is multiplied by a scale before backward and the gradients divided by it afterwards. The
scale falls where they overflow and grows back after a while without. Pure: a frozen configuration
and a state of device tensors, of which no step waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.state_version import check_version

STATE_VERSION = 1

OnMinScale = Literal["fallback", "raise"]


class LossScaleError(ArithmeticError):
    """Gradients overflow although the loss scale cannot fall any further."""


@checked
@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the loss scale moves.

    With `hysteresis=1`, `min_scale` and `max_scale` out of reach it moves exactly as that of
    `torch.amp.GradScaler`, whose defaults the first four are.

    >>> LossScaling.static(1024).growth_interval is None
    True

    Raises:
        ValueError: for a value out of range.
    """

    init_scale: float = 2.0**16
    """Where it begins."""

    growth_interval: int | None = 2000
    """Steps in a row without overflow after which it grows; None keeps it where it is."""

    growth_factor: float = 2.0
    """What it grows by."""

    backoff_factor: float = 0.5
    """What it falls by."""

    hysteresis: int = 2
    """Overflows before it falls: a single one may be an outlier's. Refilled when the scale grows,
    as in Megatron and DeepSpeed, whose default this is."""

    min_scale: float = 1.0
    """It never falls below this."""

    max_scale: float = 2.0**24
    """It never grows above this."""

    on_min_scale: OnMinScale = "fallback"
    """What an overflow at the least scale leads to: "fallback" leaves it to `PrecisionFallback`,
    "raise" ends the run with `LossScaleError`, as DeepSpeed does."""

    def __post_init__(self) -> None:
        for name in ("init_scale", "min_scale", "max_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise ValueError(
                f"init_scale must be between min_scale and max_scale ({self.min_scale:g} to"
                f" {self.max_scale:g}), got {self.init_scale!r}"
            )
        if not (math.isfinite(self.growth_factor) and self.growth_factor > 1):
            raise ValueError(f"growth_factor must be more than 1, got {self.growth_factor!r}")
        if not 0 < self.backoff_factor < 1:
            raise ValueError(f"backoff_factor must be between 0 and 1, got {self.backoff_factor!r}")
        whole = {"hysteresis": self.hysteresis}
        if self.growth_interval is not None:
            whole["growth_interval"] = self.growth_interval
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.on_min_scale not in ("fallback", "raise"):
            raise ValueError(
                f"on_min_scale must be 'fallback' or 'raise', got {self.on_min_scale!r}"
            )

    @classmethod
    def static(cls, scale: float, *, on_min_scale: OnMinScale = "fallback") -> LossScaling:
        """The same scale at every step; steps that overflow are left out all the same.

        Args:
            scale: what the loss is multiplied by.
            on_min_scale: see above; a static scale is always at its least.
        """
        return cls(
            init_scale=scale,
            growth_interval=None,
            hysteresis=1,
            min_scale=scale,
            max_scale=scale,
            on_min_scale=on_min_scale,
        )

    @classmethod
    def rl(cls, **changes: Any) -> LossScaling:
        """For reinforcement learning: grows after 400 steps, as runs are short.

        From arXiv 2510.26788, whose other values are torch's; gradients are reduced in float32
        there, as they are here wherever the weights are float32.

        Args:
            changes: other fields.
        """
        values: dict[str, Any] = {"growth_interval": 400, "hysteresis": 1, **changes}
        return cls(**values)

    @property
    def is_static(self) -> bool:
        """Whether the scale stays where it is."""
        return self.growth_interval is None

    # -- the scale's course -----------------------------------------------------------------------

    def init(self, device: torch.device | str = "cpu") -> LossScalingState:
        """At the begin of a run."""
        return self._state(device, self.init_scale, patience=self.hysteresis)

    def update(self, state: LossScalingState, found_inf: Tensor) -> LossScalingState:
        """After a step.

        Args:
            state: before it.
            found_inf: scalar, bool or number: whether any gradient was inf or NaN. On any device;
                the result is on the state's.

        Returns:
            The state for the next step.
        """
        # Selections and no branches: to ask whether a step overflowed would wait for the device.
        bad = found_inf.to(state.scale.device) != 0
        patience = torch.where(bad, (state.patience - 1).clamp(min=0), state.patience)
        exhausted = bad & (patience == 0)
        scale, clean = state.scale, torch.where(bad, 0, state.clean + 1)
        stuck = exhausted
        if self.growth_interval is not None:
            stuck = exhausted & (scale <= self.min_scale)
            fallen = (scale * self.backoff_factor).clamp(min=self.min_scale)
            grows = clean == self.growth_interval
            grown = (scale * self.growth_factor).clamp(max=self.max_scale)
            scale = torch.where(exhausted, fallen, torch.where(grows, grown, scale))
            clean = torch.where(grows, 0, clean)
            patience = torch.where(grows, self.hysteresis, patience)
        return LossScalingState(
            scale=scale,
            clean=clean.to(state.clean.dtype),
            patience=patience.to(state.patience.dtype),
            stuck=torch.where(bad, state.stuck + stuck, 0).to(state.stuck.dtype),
            made=state.made + ~bad,
            skipped=state.skipped + bad,
        )

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self, state: LossScalingState) -> dict[str, Any]:
        """Plain numbers; waits for the device."""
        return {"version": STATE_VERSION, **state.numbers()}

    def load_state_dict(
        self, saved: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> LossScalingState:
        """A saved state, within what this configuration allows.

        Args:
            saved: of `state_dict`, or of a `torch.amp.GradScaler`.
            device: where the state is to be.

        Raises:
            ValueError: if it is neither, or of another version.
        """
        if "_growth_tracker" in saved:  # torch.amp.GradScaler's
            saved = {
                "version": STATE_VERSION,
                "scale": saved["scale"],
                "clean": saved["_growth_tracker"],
                "patience": self.hysteresis,
            }
        check_version(saved, STATE_VERSION, "loss scaling state")
        scale = min(max(float(saved["scale"]), self.min_scale), self.max_scale)
        # `update` looks for the step at which `clean` reaches the interval. If it was saved under a
        # longer one, it may be past that already, and the scale would never grow again.
        interval = self.growth_interval
        return self._state(
            device,
            self.init_scale if interval is None else scale,
            clean=saved["clean"] if interval is None else min(saved["clean"], interval - 1),
            patience=min(saved["patience"], self.hysteresis),
            stuck=saved.get("stuck", 0),
            made=saved.get("made", 0),
            skipped=saved.get("skipped", 0),
        )

    def grad_scaler_state(self, state: LossScalingState) -> dict[str, Any]:
        """As `torch.amp.GradScaler.state_dict`, for plugins that have one."""
        return {
            "scale": float(state.scale),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            # torch counts in int32, and has no other way to say never
            "growth_interval": 2**31 - 1 if self.growth_interval is None else self.growth_interval,
            "_growth_tracker": int(state.clean),
        }

    @staticmethod
    def _state(
        device: torch.device | str,
        scale: float,
        *,
        clean: int = 0,
        patience: int,
        stuck: int = 0,
        made: int = 0,
        skipped: int = 0,
    ) -> LossScalingState:
        counts = (torch.tensor(value, device=device) for value in (clean, patience, stuck))
        clean_, patience_, stuck_ = counts
        return LossScalingState(
            scale=torch.tensor(scale, dtype=torch.float32, device=device),
            clean=clean_,
            patience=patience_,
            stuck=stuck_,
            made=torch.tensor(made, device=device),
            skipped=torch.tensor(skipped, device=device),
        )


@dataclass(frozen=True, kw_only=True)
class LossScalingState:
    """Where the loss scale stands; scalars on one device."""

    scale: Tensor
    """float32: what the loss is multiplied by."""

    clean: Tensor
    """int64: steps in a row without overflow, since it last grew."""

    patience: Tensor
    """int64: overflows up to that at which it falls."""

    stuck: Tensor
    """int64: overflows in a row at which it could not fall any further."""

    made: Tensor
    """int64: steps without overflow so far, the effective ones."""

    skipped: Tensor
    """int64: steps with overflow so far, all of them left out."""

    def numbers(self) -> dict[str, float | int]:
        """All of them on the host, by name; waits for the device once."""
        names = ("scale", "clean", "patience", "stuck", "made", "skipped")
        values = torch.stack([getattr(self, name).double() for name in names]).tolist()
        whole = {name: int(value) for name, value in zip(names, values, strict=True)}
        return {**whole, "scale": values[0]}

    def to(self, device: torch.device) -> LossScalingState:
        """The same on another device."""
        return LossScalingState(**{name: value.to(device) for name, value in vars(self).items()})
