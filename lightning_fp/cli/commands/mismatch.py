"""Compare formats by how far training and rollout are apart in them, on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.cli.commands.mismatch_sides import (
    Policy,
    load_policy,
    rollout_logprobs,
    training_logprobs,
)
from lightning_fp.cli.commands.plan import parse_rules
from lightning_fp.cli.output import console, print_json
from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.layers.scaling import read_scaling
from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.terminal import FittedTable

_FP32 = linear_format("fp32")

_SHOWN = {
    "E|r|": "logprob_abs_diff_mean",
    "k3": "k3_kl",
    "|r| p50": "logprob_abs_diff_p50",
    "|r| p99": "logprob_abs_diff_p99",
    "max |p-q|": "rollout_probs_diff_max",
    "E|sum r|": "seq_logprob_abs_diff_mean",
}
"""What the table has of `TrainingInferenceMismatch`."""

_AS_RATIOS = ("logprob_abs_diff_mean", "k3_kl")
"""What is also given as a multiple of the first format's."""


def run(
    factory: str,
    formats: str,
    rollout: str | None,
    layers: Sequence[str],
    batch: int,
    length: int,
    device: str,
    *,
    json: bool,
) -> int:
    """Print the mismatch of each format; see `commands.mismatch`.

    Raises:
        ValueError: if the policy cannot be built or run.
    """
    for name, value, least in (("batch", batch, 1), ("length", length, 2)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    wanted = [_format(name.strip()) for name in formats.split(",")]
    engine = None if rollout is None else _format(rollout)
    policy = load_policy(factory, batch=batch, length=length, device=_device(device))
    rules = parse_rules(layers)
    compared = compare(policy, wanted, engine, rules)
    if json:
        print_json(_as_json(policy, compared))
    else:
        _print(policy, compared)
    return 0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One format, on both sides."""

    format: str
    """Of training."""

    rollout: str
    """Of the engine."""

    values: dict[str, float]
    """Of `TrainingInferenceMismatch`."""

    error: float
    """Mean difference of training's log-probabilities from those in fp32."""


def compare(
    policy: Policy,
    formats: Sequence[LinearFormat],
    rollout: LinearFormat | None = None,
    layers: dict[str, str] | None = None,
) -> list[Compared]:
    """The mismatch of each format over the policy's tokens.

    Args:
        policy: what to evaluate; stays as it is.
        formats: of training.
        rollout: of the engine; None takes training's.
        layers: rules for formats below 16 bits, on both sides.
    """
    exact = training_logprobs(policy, _FP32)
    engines: dict[LinearFormat, Tensor] = {}
    compared: list[Compared] = []
    for format in formats:
        engine = format if rollout is None else rollout
        if engine not in engines:
            engines[engine] = rollout_logprobs(policy, engine, _rules(engine, layers))
        train = training_logprobs(policy, format, _rules(format, layers))
        metric = TrainingInferenceMismatch().to(train.device)
        metric.update(engines[engine], train)
        compared.append(
            Compared(
                format=format.name,
                rollout=engine.name,
                values={name: value.item() for name, value in metric.compute().items()},
                error=(train.double() - exact.double()).abs().mean().item(),
            )
        )
    return compared


def _rules(format: LinearFormat, layers: dict[str, str] | None) -> dict[str, str] | None:
    return None if format.is_high_precision else layers


def _format(name: str) -> LinearFormat:
    format = read_scaling(name).format
    if format.scaling == "delayed":
        raise ValueError(
            f"format must not need a history, got {name!r}: one batch has none; take 'fp8-dynamic',"
            " or measure a run with MismatchMonitor"
        )
    return format


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    return torch.device(name)


# -- output ----------------------------------------------------------------------------------------


def _print(policy: Policy, compared: Sequence[Compared]) -> None:
    formats = [row.format for row in compared]
    grid = FittedTable("", "training", *formats, right=formats)
    grid.add_row("rollout", *(row.rollout for row in compared))
    for title, name in _SHOWN.items():
        values = [row.values[name] for row in compared]
        grid.add_row(title, *(f"{value:.2e}" for value in values))
        if name in _AS_RATIOS:
            grid.add_row("  to the first", *(_times(value, values[0]) for value in values))
    grid.add_row("off fp32", *(f"{row.error:.2e}" for row in compared))
    screen = console()
    screen.print(grid)
    for line in _notes(policy, compared):
        screen.print(line, markup=False, soft_wrap=True, style="dim")


def _notes(policy: Policy, compared: Sequence[Compared]) -> list[str]:
    tokens = int(compared[0].values["tokens"])
    whence = "sampled from the model in fp32" if policy.sampled else "as the factory gave them"
    engine = (
        "each sequence by itself, for lack of a decode"
        if policy.decode is None
        else "decode of the factory"
    )
    return [
        f"r = log p(training) - log p(rollout) of {tokens} tokens, {whence}",
        "training: one forward of the batch under autocast, on fp32 weights",
        f"rollout: weights and activations in the format's dtype, bf16 for those below; {engine}",
        "off fp32: E|log p(training) - log p(fp32)|",
    ]


def _as_json(policy: Policy, compared: Sequence[Compared]) -> dict[str, Any]:
    first = compared[0].values
    rows: list[dict[str, Any]] = []
    for row in compared:
        ratios = {name: _ratio(row.values[name], first[name]) for name in _AS_RATIOS}
        rows.append({**asdict(row), "to_first": ratios})
    return {
        "sequences": policy.tokens.shape[0],
        "tokens": int(first["tokens"]),
        "sampled": policy.sampled,
        "decode": policy.decode is not None,
        "formats": rows,
    }


def _ratio(value: float, first: float) -> float | None:
    return value / first if first else None


def _times(value: float, first: float) -> str:
    ratio = _ratio(value, first)
    return "" if ratio is None else f"x {ratio:.2g}"
