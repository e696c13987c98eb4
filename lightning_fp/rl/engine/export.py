"""A checkpoint for an inference engine, of exactly what training multiplied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_fp.choices import check_choice
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.rl.engine.checkpoint_formats import FORMATS, CheckpointFormat, FormatName
from lightning_fp.rl.engine.quantised import decide, in_high_precision
from lightning_fp.rl.engine.safetensors_files import Part, write_safetensors
from lightning_fp.rl.engine.weight_casts import Scaled, scaled_by
from lightning_fp.rl.engine.weights import LayerWeight, Weights, weights_of

SHARD = 5 * 10**9
"""Bytes of a file at most, as transformers has it by default; a larger tensor has its own."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    files: tuple[str, ...]
    """The safetensors files."""

    fp8: tuple[str, ...]
    """Layers in FP8."""

    high: tuple[str, ...]
    """Modules with weights in bf16, as listed in the config."""

    requantised: tuple[str, ...]
    """Of the layers in FP8, those that were cast anew, and are not what training multiplied."""

    bytes: int
    """Of all tensors."""

    def lines(self) -> list[str]:
        """In words."""
        layers, files = len(self.fp8), len(self.files)
        lines = [
            f"{layers} layer{'s' * (layers > 1)} in FP8, {self.bytes / 2**20:,.1f} MiB in"
            f" {files} file{'s' * (files > 1)}"
        ]
        if self.requantised:
            names = ", ".join(fold_names(self.requantised))
            lines.append(f"cast anew, other than in training: {names}")
        if self.high:
            lines.append(f"in bf16: {', '.join(fold_names(self.high))}")
        return lines


def export_model(
    model: nn.Module,
    directory: str | Path,
    format: FormatName = "hf-fp8-block",
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    requantise: bool = False,
) -> Exported:
    """Write a model's weights as an inference engine loads them.

    Args:
        model: converted by `convert`, a precision plugin or a loop. Under FSDP2 call it on all
            ranks; each writes the same, so give only one of them a directory that stays.
        directory: where to; without safetensors files and config.json so far.
        format: "hf-fp8-block" or "compressed-tensors-fp8".
        config: the model's config.json, to be completed; None writes what concerns the format.
        prefix: what names begin with and is to be left out, e.g. "model." of a LightningModule;
            what does not begin so is left out too.
        requantise: whether a layer whose scales the format cannot hold is cast anew.

    Returns:
        What was written.

    Raises:
        ValueError: for an unknown format, a directory in use, no layer in FP8, or a layer whose
            scales the format cannot hold.
    """
    weights = weights_of(model)
    return export_weights(
        weights, directory, format, config=config, prefix=prefix, requantise=requantise
    )


def export_weights(
    weights: Weights,
    directory: str | Path,
    format: FormatName,
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    requantise: bool = False,
    shard: int = SHARD,
) -> Exported:
    """See `export_model`.

    Args:
        weights: of a model or a checkpoint.
        directory: as there.
        format: as there.
        config: as there.
        prefix: as there.
        requantise: as there.
        shard: bytes of a file at most.
    """
    check_choice("format", format, FORMATS)
    target, out = FORMATS[format], Path(directory)
    if any(out.glob("*.safetensors")) or (out / "config.json").exists():
        raise ValueError(
            f"directory must be without safetensors files and config.json, got {str(out)!r}; give"
            " another one, and the model's config.json as config"
        )
    if not weights.layers:
        raise ValueError(
            "model must have layers in FP8, got one with all of them in high precision; save its"
            " state_dict as it is"
        )
    layers = {
        name.removeprefix(prefix): decide(
            name, layer, target.held, target.anew, requantise=requantise, where=repr(format)
        )
        for name, layer in weights.layers.items()
        if name.startswith(prefix)
    }
    if not layers:
        raise ValueError(
            f"prefix must be what the names of layers in FP8 begin with, got {prefix!r}; there are"
            f" {', '.join(fold_names(weights.layers))}"
        )
    scaled: dict[str, Scaled] = {
        name: scaled_by(layer.format) or target.anew for name, layer in layers.items()
    }
    _check_not_tied(weights, layers, prefix)
    parts = _parts(weights, layers, scaled, target, prefix)
    others = _others(parts, layers)
    entry = target.config(scaled, others)  # refuses names that it cannot tell apart

    out.mkdir(parents=True, exist_ok=True)
    files = _write(out, parts, shard)
    complete = {**(config or {}), "quantization_config": entry}
    if config is not None:
        complete["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(complete, indent=2) + "\n")
    before = {name.removeprefix(prefix): layer for name, layer in weights.layers.items()}
    return Exported(
        files=tuple(files),
        fp8=tuple(layers),
        high=tuple(others),
        requantised=tuple(name for name in layers if layers[name] is not before[name]),
        bytes=sum(part.bytes for part in parts),
    )


def _check_not_tied(weights: Weights, layers: Mapping[str, LayerWeight], prefix: str) -> None:
    """Readers tie weights again, and would take an embedding's values for those of its head."""
    fp8 = {f"{prefix}{layer}.weight" for layer in layers}
    others = {each.address: name for name, each in weights.tensors.items() if name not in fp8}
    for name in fp8 & weights.tensors.keys():
        stored = weights.tensors[name]
        if stored.address and stored.address in others:
            raise ValueError(
                f"{name!r} must not be in FP8 while it is tied to {others[stored.address]!r}, which"
                " is not: readers tie them again; leave the layer in high precision"
            )


def _parts(
    weights: Weights,
    layers: Mapping[str, LayerWeight],
    scaled: Mapping[str, Scaled],
    target: CheckpointFormat,
    prefix: str,
) -> list[Part]:
    parts: list[Part] = []
    for full, stored in weights.tensors.items():
        name = full.removeprefix(prefix)
        layer, _, kind = name.rpartition(".")
        if not full.startswith(prefix):
            continue
        if kind == "weight" and layer in layers:
            of = layers[layer]

            def cast(of: LayerWeight = of, load: Any = stored.load) -> list[torch.Tensor]:
                made = of.cast(load())
                return [made.tensor, target.scale(made)]

            shape = target.scale_shape(scaled[layer], stored.shape)
            tensors = {
                name: (torch.float8_e4m3fn, stored.shape),
                f"{layer}.{target.suffix}": (torch.float32, shape),
            }
            parts.append(Part(tensors=tensors, make=cast))
        else:
            dtype = torch.bfloat16 if stored.dtype.is_floating_point else stored.dtype

            def plain(load: Any = stored.load) -> list[torch.Tensor]:
                return [in_high_precision(load())]

            parts.append(Part(tensors={name: (dtype, stored.shape)}, make=plain))
    return parts


def _others(parts: Sequence[Part], layers: Mapping[str, object]) -> list[str]:
    """Modules with weights that are not in FP8: linear layers left alone, embeddings, experts.

    Experts are 3-D Parameters of any name, and readers make FP8 experts of what is not listed.
    """
    others: list[str] = []
    for part in parts:
        for name, (_, shape) in part.tensors.items():
            module, _, kind = name.rpartition(".")
            if len(shape) == 2 and kind == "weight" and module not in layers:
                others.append(module)
            inside = any(layer.startswith(f"{module}.") for layer in layers)
            if len(shape) == 3 and module and not inside:
                others.append(module)
    return list(dict.fromkeys(others))


def _write(out: Path, parts: Sequence[Part], shard: int) -> list[str]:
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + part.bytes > shard:
            shards.append([])
        shards[-1].append(part)
    if len(shards) == 1:
        write_safetensors(out / "model.safetensors", parts)
        return ["model.safetensors"]
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    places: dict[str, str] = {}
    for file, members in zip(files, shards, strict=True):
        write_safetensors(out / file, members)
        places |= {name: file for part in members for name in part.tensors}
    index = {
        "metadata": {"total_size": sum(part.bytes for part in parts)},
        "weight_map": places,
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files
