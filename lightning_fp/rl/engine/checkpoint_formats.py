"""The FP8 checkpoint formats that inference engines load: names of tensors, and their config.

`hf-fp8-block` is DeepSeek-V3's, which transformers (`FineGrainedFP8Config`), vLLM and SGLang read:
e4m3 codes, and `weight_scale_inv`, a float32 for each block of 128x128, by which codes are
multiplied. `compressed-tensors-fp8` is what llm-compressor writes and vLLM reads: `weight_scale`, a
factor for the tensor, each row or each block (compressed-tensors, quantization/quant_scheme.py:
FP8, FP8_DYNAMIC and FP8_BLOCK, here with dynamic activations in all three).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_fp.kernels.block import BLOCK
from lightning_fp.rl.engine.weight_casts import Scaled, WeightCast

FormatName = Literal["hf-fp8-block", "compressed-tensors-fp8"]

Config = Callable[[Mapping[str, Scaled], Sequence[str]], dict[str, Any]]
"""From what shares a scale, by layer in FP8, and the names of the other modules with weights, to
the entry `quantization_config`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """How FP8 weights lie in a checkpoint."""

    name: FormatName

    held: tuple[Scaled, ...]
    """What may share a scale."""

    anew: Scaled
    """What shares one where a weight is cast anew."""

    suffix: str
    """What comes after the layer's name, of the scale."""

    scale: Callable[[WeightCast], Tensor]
    """The scale as it is stored, float32."""

    scale_shape: Callable[[Scaled, tuple[int, ...]], tuple[int, ...]]
    """Its shape, for a weight of this shape."""

    config: Config


def _grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


def _hf_config(layers: Mapping[str, Scaled], others: Sequence[str]) -> dict[str, Any]:
    for name in layers:
        skipped = [key for key in others if _skips(key, name)]
        if skipped:
            raise ValueError(
                f"layer {skipped[0]!r} must not be in high precision beside {name!r} in FP8 in"
                " 'hf-fp8-block': readers leave out every layer whose name begins or ends with one"
                " of modules_to_not_convert; take 'compressed-tensors-fp8'"
            )
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(others),
    }


def _skips(key: str, name: str) -> bool:
    """Whether transformers leaves a layer out by a key (quantizers_utils.should_convert_module)."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return re.match(rf"(?:{key}){boundary}", name) is not None or name.endswith(key)


_STRATEGY: Mapping[Scaled, str] = {"tensor": "tensor", "row": "channel", "block": "block"}
_ACTIVATIONS: Mapping[Scaled, str] = {"tensor": "tensor", "row": "token", "block": "group"}
"""What training does with the input beside such a weight."""


def _compressed_config(layers: Mapping[str, Scaled], others: Sequence[str]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(layers.values()))
    groups: dict[str, Any] = {}
    for index, scaled in enumerate(kinds):
        named = [name for name, each in layers.items() if each == scaled]
        shared = {"num_bits": 8, "type": "float", "symmetric": True}
        block = {"block_structure": [BLOCK, BLOCK]} if scaled == "block" else {}
        group = {"group_size": BLOCK} if scaled == "block" else {}
        groups[f"group_{index}"] = {
            # by name where there are several kinds, for each layer may be in one group only
            "targets": ["Linear"] if len(kinds) == 1 else named,
            "weights": {**shared, "strategy": _STRATEGY[scaled], "dynamic": False, **block},
            "input_activations": {
                **shared,
                "strategy": _ACTIVATIONS[scaled],
                "dynamic": True,
                **group,
            },
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(others),
        "kv_cache_scheme": None,
    }


def _compressed_shape(scaled: Scaled, shape: tuple[int, ...]) -> tuple[int, ...]:
    return {"tensor": (1,), "row": (shape[0], 1), "block": _grid(shape)}[scaled]


FORMATS: Mapping[str, CheckpointFormat] = {
    "hf-fp8-block": CheckpointFormat(
        name="hf-fp8-block",
        held=("block", "tensor"),  # one scale for all is a scale for each block
        anew="block",
        suffix="weight_scale_inv",
        scale=lambda cast: cast.in_blocks().scale,
        scale_shape=lambda _, shape: _grid(shape),
        config=_hf_config,
    ),
    "compressed-tensors-fp8": CheckpointFormat(
        name="compressed-tensors-fp8",
        held=("tensor", "row", "block"),
        anew="row",
        suffix="weight_scale",
        scale=lambda cast: cast.scale.reshape(1) if cast.scaled == "tensor" else cast.scale,
        scale_shape=_compressed_shape,
        config=_compressed_config,
    ),
}
"""By name."""
