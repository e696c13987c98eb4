"""What one step has shown so far, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fp.telemetry.stability.signals import NAMES, SIGNALS


class StepValues:
    """Collects each signal over the micro-batches of a step; nothing is read from the device."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take in what a forward or a step has shown.

        Args:
            name: of the signal.
            value: scalar, on any device; NaN counts as nothing seen where there is something else.
        """
        self._seen.setdefault(name, []).append(value.detach().float())

    def take(self, device: torch.device) -> Tensor:
        """The step's row, and begin anew.

        Args:
            device: where it is wanted.

        Returns:
            float32 [signals]; NaN where nothing was seen.
        """
        row = torch.full((len(NAMES),), torch.nan, device=device)
        for index, signal in enumerate(SIGNALS):
            seen = self._seen.get(signal.name)
            if seen:
                values = torch.stack([value.to(device) for value in seen])
                row[index] = values.nanmean() if signal.combine == "mean" else _largest(values)
        self._seen = {}
        return row


def _largest(values: Tensor) -> Tensor:
    """The largest that is a number; NaN without any."""
    found = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax()
    return torch.where(found == -torch.inf, torch.nan, found)
