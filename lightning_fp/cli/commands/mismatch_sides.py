"""A policy as the trainer and as a rollout engine evaluate it, in any format."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp.cli.loading import build
from lightning_fp.layers import LinearFormat, convert

Decode = Callable[[nn.Module, Tensor], Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats that are a dtype of the whole model."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a factory gave, in float32 and evaluation mode."""

    model: nn.Module

    tokens: Tensor
    """int64 [batch, tokens]."""

    decode: Decode | None
    """What a rollout engine computes: `decode(model, tokens)` gives the same logits as
    `model(tokens)`, token by token through its cache. None where the factory gave none."""

    sampled: bool
    """Whether the tokens were sampled from the model, because the factory gave none."""


def load_policy(reference: str, *, batch: int, length: int, device: torch.device) -> Policy:
    """Build a policy from what a factory returns.

    Args:
        reference: "package.module:factory" or "path/to/file.py:factory"; the factory returns a
            model, or (model, tokens), or (model, tokens, decode).
        batch: sequences to sample where there are no tokens.
        length: tokens of each of them.
        device: where to run it.

    Raises:
        ValueError: if the factory fails or returns something else.
    """
    built = build(reference)
    parts: list[Any] = list(built) if isinstance(built, tuple) else [built]
    model, tokens, decode = (*parts, None, None)[:3]
    if not isinstance(model, nn.Module) or len(parts) > 3:
        raise ValueError(
            f"{reference} must return a model, (model, tokens) or (model, tokens, decode), got"
            f" {type(model).__name__ if len(parts) <= 3 else f'a tuple of {len(parts)}'}"
        )
    if decode is not None and not callable(decode):
        raise ValueError(
            f"decode of {reference} must be a function of (model, tokens), got"
            f" {type(decode).__name__}"
        )
    model = model.to(device).float().eval()
    sampled = tokens is None
    if sampled:
        tokens = sample(model, batch=batch, length=length, device=device)
    integer = isinstance(tokens, Tensor) and not tokens.is_floating_point()
    if not integer or tokens.dim() != 2 or tokens.shape[1] < 2:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"tokens of {reference} must be integers [batch, tokens], at least 2 tokens, got"
            f" {shape}"
        )
    return Policy(model=model, tokens=tokens.to(device), decode=decode, sampled=sampled)


@torch.no_grad()
def sample(model: nn.Module, *, batch: int, length: int, device: torch.device) -> Tensor:
    """Sequences that the model itself finds likely, as a rollout's are; int64 [batch, length].

    Args:
        model: gives logits [batch, tokens, vocabulary].
        batch: number of sequences.
        length: tokens of each; the first one is random.
        device: where the model is.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    vocabulary = _logits(_called(lambda: model(start), "sampling"), start).shape[-1]
    tokens = torch.randint(vocabulary, (batch, 1), generator=generator)
    while tokens.shape[1] < length:
        now = tokens.to(device)
        logits = _logits(_called(lambda now=now: model(now), "sampling"), now)[:, -1]
        chances = logits.float().softmax(dim=-1).cpu()
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens.to(device)


@torch.no_grad()
def training_logprobs(
    policy: Policy, format: LinearFormat, layers: Mapping[str, str] | None = None
) -> Tensor:
    """The trainer's: one forward of the whole batch, under autocast on float32 weights.

    Args:
        policy: stays as it is.
        format: of the linear layers; everything else is in `dtype_of` it.
        layers: rules for single layers.

    Returns:
        [batch, tokens - 1], of every token but the first, float32.

    Raises:
        ValueError: if the forward fails, or a format cannot be had.
    """
    model, dtype = _in_format(policy.model, format, layers), dtype_of(format)
    tokens = policy.tokens
    autocast = torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with autocast:
        output = _called(lambda: model(tokens), f"training in {format.name}")
    return _of_tokens(output, tokens)


@torch.no_grad()
def rollout_logprobs(
    policy: Policy, format: LinearFormat, layers: Mapping[str, str] | None = None
) -> Tensor:
    """The engine's: all weights and activations in one dtype; see `training_logprobs`.

    Through the policy's `decode`; without one each sequence runs by itself.
    """
    dtype, tokens = dtype_of(format), policy.tokens
    engine = _in_format(copy.deepcopy(policy.model).to(dtype), format, layers)
    doing, decode = f"rollout in {format.name}", policy.decode
    if decode is not None:
        return _of_tokens(_called(lambda: decode(engine, tokens), f"decode, {doing}"), tokens)
    rows = [_of_tokens(_called(lambda row=row: engine(row), doing), row) for row in tokens.split(1)]
    return torch.cat(rows)


def dtype_of(format: LinearFormat) -> torch.dtype:
    """What everything but the linear layers computes in: the format's own dtype, or bf16."""
    return DTYPES.get(format.name, torch.bfloat16)


def _in_format(
    model: nn.Module, format: LinearFormat, layers: Mapping[str, str] | None
) -> nn.Module:
    if format.name in DTYPES and not layers:
        return model
    converted = copy.deepcopy(model)
    convert(converted, format, layers, fp8_eval=True)
    return converted


def _called(function: Callable[[], Any], doing: str) -> Any:
    try:
        return function()
    except Exception as error:  # whatever a user's forward raises
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"the model failed at {doing}: {what}") from error


def _logits(output: Any, tokens: Tensor) -> Tensor:
    logits: Any = getattr(output, "logits", output)
    right = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == tokens.shape
    if not right:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model must give logits [batch, tokens, vocabulary], got {got} for tokens"
            f" {tuple(tokens.shape)}"
        )
    return logits


def _of_tokens(output: Any, tokens: Tensor) -> Tensor:
    logprobs = _logits(output, tokens)[:, :-1].float().log_softmax(dim=-1)
    return logprobs.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
