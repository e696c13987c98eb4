"""One step's log-probabilities by rollout and training, over its micro-batches and all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.metrics.mismatch_names import ALIASES, Aliases
from lightning_fp.rank_group import current_group, ranks
from lightning_fp.rl.causes import Causes, CauseSums, cause_sums, causes_of, merged
from lightning_fp.rl.origin import SampleOrigin
from lightning_fp.shown import a_kind
from lightning_fp.telemetry.over_ranks import total

_PARTS = ("rollout_logprobs", "train_logprobs", "mask")


class MismatchTally:
    """Takes in what a hook or a training step gives, and says whose fault it is if that is bad.

    Args:
        source: who gives the log-probabilities, to be named in errors.
        aliases: see `TrainingInferenceMismatch`.
        threshold: see `TrainingInferenceMismatch`.
    """

    def __init__(self, source: str, aliases: Aliases, threshold: float) -> None:
        self.source = source
        """Who gives the log-probabilities."""
        self.aliases = set(ALIASES.get(aliases, {}))
        """The metrics' names that others give them."""
        self.measuring = False
        """Whether the step under way is measured."""
        self.causes: Causes | None = None
        """What the mismatch came from in the step that `values` told of last; None where nothing
        was given to tell by."""
        self._metric = TrainingInferenceMismatch(
            aliases, threshold=threshold, process_group=current_group()
        )
        self._updates = 0
        self._sums: CauseSums | None = None

    def start(self, device: torch.device) -> None:
        """Begin anew, with sums on a device."""
        self._metric.to(device)
        self.clear()

    def clear(self) -> None:
        """Forget what was taken in."""
        self._metric.reset()
        self._updates = 0
        self._sums = None

    def add(self, given: Any) -> None:
        """Take in a micro-batch.

        Args:
            given: rollout_logprobs, train_logprobs and a mask or None, or the first two; each
                [batch, tokens]. Fourth a `SampleOrigin` or None.

        Raises:
            ValueError: if it is something else; values above 0 are found here on the CPU and by
                `values` on other devices.
        """
        parts: list[Any] = list(given) if isinstance(given, (tuple, list)) else [given]
        origin = parts.pop() if len(parts) == len(_PARTS) + 1 else None
        if origin is not None and not isinstance(origin, SampleOrigin):
            raise ValueError(
                f"{self.source} must give a SampleOrigin in the fourth place, got"
                f" {_described(origin)}"
            )
        if len(parts) not in (2, 3):
            raise ValueError(
                f"{self.source} must give ({', '.join(_PARTS)}), got {_described(given)}"
            )
        for name, part in zip(_PARTS, parts, strict=False):
            if not isinstance(part, torch.Tensor) and not (name == "mask" and part is None):
                raise ValueError(
                    f"{self.source} must give tensors [batch, tokens], got {_described(part)} for"
                    f" {name}"
                )
        device = self._metric.token_sums.device
        on_device: list[Any] = [None if part is None else part.to(device) for part in parts]
        try:
            self._metric.update(*on_device)
            if origin is not None:
                mask = on_device[2] if len(on_device) > 2 else None
                sums = cause_sums(on_device[0], on_device[1], mask, origin)
                self._sums = sums if self._sums is None else merged([self._sums, sums])
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error
        self._updates += 1

    def values(self, *, failed: bool) -> dict[str, float] | None:
        """What was taken in since `clear`, over all ranks; to be called alike on all of them.

        Args:
            failed: whether this rank cannot go on.

        Returns:
            The metrics by name, the same on every rank; None if no rank took anything in.

        Raises:
            RankFailedError: on all ranks, if any of them cannot go on.
            ValueError: if no token counts, or log-probabilities are above 0.
        """
        # First of all whether everybody can go on: `compute` has collectives of its own, and a rank
        # that is missing there keeps the others waiting.
        if ranks() == 1 and not (failed or self._updates):
            return None  # nobody else could have any, and to ask would wait for the device
        device = self._metric.token_sums.device
        own = float(failed), float(self._updates), float(self._sums is not None)
        told = total(torch.tensor(own, device=device))
        failures, updates, with_causes = told.tolist()
        if failures:
            raise RankFailedError("a rank cannot measure the mismatch any more")
        if not updates:
            return None
        if not self._updates:  # others have some: take part in the sum, with nothing
            nothing = torch.zeros(0, 0, device=device)
            self._metric.update(nothing, nothing)
        try:
            computed = self._metric.compute()
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error
        values = dict(zip(computed, torch.stack(list(computed.values())).tolist(), strict=True))
        self._check_not_empty(values)
        self.causes = self._causes() if with_causes else None
        return values

    def _causes(self) -> Causes | None:
        """Over all ranks; a collective."""
        own = None if self._sums is None else self._sums.cpu()
        parts: list[CauseSums | None] = [own]
        if ranks() > 1:
            parts = [None] * ranks()
            dist.all_gather_object(parts, own, group=current_group())
        given = [part for part in parts if part is not None]
        return causes_of(merged(given)) if given else None

    def _check_not_empty(self, values: Mapping[str, float]) -> None:
        if values["tokens"]:
            return
        if values["nonfinite"]:
            raise ValueError(
                f"{self.source} must give finite log-probabilities, got {values['nonfinite']:.0f}"
                " tokens of which none is finite on both sides"
            )
        raise ValueError(
            f"{self.source} must give a mask that counts tokens, got one that is 0 everywhere; it"
            " is 1 for sampled tokens and 0 for prompt and padding"
        )


class RankFailedError(Exception):
    """Some rank cannot go on, so none does."""


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        items: list[Any] = list(value)
        return f"{a_kind(value)} of {len(items)}"
    return f"{a_kind(value)}"
