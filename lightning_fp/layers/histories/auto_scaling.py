"""fp8-auto: dynamic scaling until the run itself shows that delayed scaling would not clamp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.counting import counted

DELAYED_TOKEN_LIMIT = 200e9
"""Training tokens beyond which delayed scaling is known to fail late: SwiGLU outliers made it
diverge at about 200B tokens (arXiv 2409.12517), so that no short trial can certify it."""


@checked
@dataclass(frozen=True, kw_only=True)
class AutoScaling:
    """When a layer may move from dynamic to delayed scaling, and when it has to move back."""

    tokens: float | None = None
    """Tokens the whole training will see. Unknown, no layer moves."""

    token_limit: float = DELAYED_TOKEN_LIMIT
    """Budget from which on every layer stays dynamic."""

    window: int = 200
    """Steps in a row in which delayed scaling would not have clamped before a layer moves."""

    clamp_bits: float = 1.0
    """How far, in bits, the largest value of a delayed layer may exceed what its scale can hold
    before the layer moves back. Judged on the amax, exact at every step."""

    check_every: int = 16
    """Steps between looks at the device; a layer moves back at most that late."""

    def __post_init__(self) -> None:
        for field in ("window", "check_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)!r}")
        if self.tokens is not None and self.tokens <= 0:
            raise ValueError(f"tokens must be positive, got {self.tokens!r}")
        if self.clamp_bits < 0:
            raise ValueError(f"clamp_bits must be at least 0, got {self.clamp_bits!r}")

    @property
    def allows_delayed(self) -> bool:
        """Whether the token budget is known and small enough."""
        return self.tokens is not None and self.tokens < self.token_limit


@dataclass(frozen=True)
class Move:
    """One layer's change of scaling."""

    layer: str
    format: str
    reason: str


class AutoScalingState:
    """Follows the headroom that every layer's history leaves, under either scaling.

    Args:
        config: when to move.
    """

    def __init__(self, config: AutoScaling) -> None:
        self.config = config
        self._steps = 0
        self._least: Tensor | None = None
        self._safe_since: dict[str, int] = {}

    def step(self, layers: Sequence[str], delayed: Sequence[bool], headroom: Tensor) -> list[Move]:
        """Take in one step's headroom; decide every `check_every` steps.

        Args:
            layers: the names of the layers.
            delayed: whether each is under delayed scaling now.
            headroom: float32 [layers, operands] in bits, negative where delayed scaling clamps or
                would have; inf where nothing was seen or there is no history yet.

        Returns:
            The layers to move.
        """
        least = headroom.amin(dim=1)
        if self._least is None or self._least.shape != least.shape:
            self._least = torch.full_like(least, torch.inf)
        torch.minimum(self._least, least, out=self._least)
        self._steps += 1
        if self._steps % self.config.check_every:
            return []
        values: list[float] = self._least.tolist()
        self._least = None
        moves = (self._decide(*layer) for layer in zip(layers, delayed, values, strict=True))
        return [move for move in moves if move is not None]

    def _decide(self, layer: str, delayed: bool, least: float) -> Move | None:
        if delayed:
            if least >= -self.config.clamp_bits:
                return None
            self._safe_since.pop(layer, None)
            reason = f"delayed scaling clamped: amax {-least:.1f} bits above what the scale holds"
            return Move(layer, "fp8-dynamic", reason)
        if least < 0 or least == torch.inf:
            self._safe_since.pop(layer, None)
            return None
        since = self._safe_since.setdefault(layer, self._steps - self.config.check_every)
        if not self.config.allows_delayed or self._steps - since < self.config.window:
            return None
        steps = counted(self._steps - since, "step")
        return Move(
            layer,
            "fp8-delayed",
            f"delayed scaling would not have clamped in {steps}",
        )

    def state_dict(self) -> dict[str, object]:
        """Counters, to continue exactly; a window that is open starts anew."""
        return {
            "steps": self._steps,
            "safe_since": dict(self._safe_since),
            "least": None if self._least is None else self._least.clone(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """See `state_dict`."""
        self._steps = int(state["steps"])  # pyright: ignore[reportArgumentType]
        self._safe_since = dict(state["safe_since"])  # pyright: ignore
        least = state["least"]
        self._least = least.clone() if isinstance(least, Tensor) else None
