"""What log-probabilities of sampled tokens have to be, for all that compares two sides of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_fp.shown import a_kind

ROUNDING = 1e-3
"""What a log-probability may exceed 0 by: more than bf16 rounds 1 by on its way through a softmax,
less than what the probabilities of sampled tokens are."""


def check_sides(rollout: Tensor, train: Tensor, mask: Tensor | None) -> None:
    """Refuse what is no batch of log-probabilities by both sides; waits for no device.

    Args:
        rollout: [batch, tokens], by the engine that sampled.
        train: [batch, tokens], by the policy that is trained.
        mask: [batch, tokens]; None: all count.

    Raises:
        ValueError: for what is no Tensor, other dtypes, and shapes that differ.
    """
    sides = {"rollout_logprobs": rollout, "train_logprobs": train}
    for name, given in {**sides, **({} if mask is None else {"mask": mask})}.items():
        if not isinstance(given, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"{name} must be a Tensor, got {a_kind(given)}; torch.as_tensor makes one"
            )
    for name, logprobs in sides.items():
        if not logprobs.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {logprobs.dtype}")
        if logprobs.dim() != 2:
            raise ValueError(
                f"{name} must be [batch, tokens], got shape {tuple(logprobs.shape)}; add the"
                " missing dimension with unsqueeze(0), or gather the sampled tokens"
            )
    check_same_shape("rollout_logprobs", rollout, {"train_logprobs": train, "mask": mask})


def check_same_shape(name: str, first: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors whose shape is not the first's.

    Args:
        name: of the first.
        first: any.
        others: by name; None has none.

    Raises:
        ValueError: naming both.
    """
    for other, tensor in others.items():
        if tensor is not None and tensor.shape != first.shape:
            raise ValueError(
                f"{other} must have the shape of {name}, {tuple(first.shape)}, got"
                f" {tuple(tensor.shape)}; leave the prompt out of both or in both"
            )


def not_logprobs(got: str) -> ValueError:
    """The error for values above 0."""
    return ValueError(
        f"rollout_logprobs and train_logprobs must be log-probabilities, 0 or less, got {got};"
        " take the logarithm of probabilities, and mask what is no sampled token"
    )
