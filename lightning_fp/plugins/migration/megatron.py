"""Megatron's `--te-precision-config-file`: which layers run in which recipe.

The YAML has `configs`, each with a recipe for training and perhaps one for evaluation, and
`matchers`, globs over module names of which the first enabled one that matches chooses a config
(Megatron-LM, TransformerEngineMixedPrecision.md). Our layer rules are ordered globs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_fp.choices import check_choice
from lightning_fp.layers import Backend, FormatLike, linear_format
from lightning_fp.plugins.migration.libraries import Migration
from lightning_fp.plugins.migration.options import Options, recipe_format

_TYPE = "transformer_engine_config_type"


def from_megatron(
    path_or_text: str | Path, scaling: FormatLike = "bf16", *, backend: Backend = "auto"
) -> Migration:
    """The plugin's arguments for one of Megatron's precision files.

    Args:
        path_or_text: the file, or its text.
        scaling: the format of the layers that no matcher names, what Megatron's `--fp8-recipe`
            says; a config without `override_quantized_autocast`, or
            `override_nonquantized_autocast` if this is high precision, leaves layers in it.
        backend: which kernels to use.

    Returns:
        The arguments. Names are Megatron's: a pattern that matches no layer of the model is
        refused at setup.

    Raises:
        ValueError: for what is no such file, or a recipe that has no equal.
    """
    document = _read(path_or_text)
    configs, matchers = _mapping(document, "configs"), _mapping(document, "matchers")
    layers: dict[str, str] = {}
    evaluations: set[bool] = set()
    for name, matcher in matchers.items():
        options = Options(f"matcher {name!r}: Megatron", matcher)
        options.must_be("type", "glob", "only globs are known")
        pattern, config = options.take("pattern"), options.take("config")
        enabled = options.take("enabled", True)
        options.end()
        check_choice(f"matcher {name!r}: config", config, configs)
        if not enabled or pattern in layers:  # the first match wins
            continue
        layers[pattern], evaluated = _config(config, configs[config], linear_format(scaling).name)
        if evaluated is not None:
            evaluations.add(evaluated)
    if len(evaluations) > 1:
        raise ValueError(
            "configs must evaluate alike, got some with evaluation_recipe {} and some without;"
            " fp8_eval is one switch for all layers"
        )
    quantized = linear_format(scaling).is_fp8
    arguments = {
        "scaling": scaling,
        "backend": backend,
        "layers": layers,
        # Without a recipe for evaluation Megatron evaluates as it trains.
        "fp8_eval": evaluations.pop() if evaluations else quantized,
    }
    return Migration(arguments=arguments)


def _config(name: str, config: Any, default: str) -> tuple[str, bool | None]:
    """One config's format, and whether it is evaluated in; None if it is high precision."""
    options = Options(f"config {name!r}: Megatron", config)
    options.must_be(_TYPE, "TEQuantizationParams", "no other is known")
    training = options.take("training_recipe")
    evaluation = options.take("evaluation_recipe")
    options.end()
    if training is None:
        raise ValueError(f"config {name!r} must have a training_recipe, got none; {{}} is BF16")
    format = _recipe(f"config {name!r}: Megatron", training, default)
    if linear_format(format).is_high_precision:
        return format, None
    if evaluation is None:
        return format, True
    evaluated = _recipe(f"config {name!r}: Megatron", evaluation, default)
    if evaluated == format or linear_format(evaluated).is_high_precision:
        return format, evaluated == format
    raise ValueError(
        f"config {name!r} must be evaluated as it is trained or in high precision, got"
        f" {evaluated!r} after {format!r}"
    )


def _recipe(where: str, recipe: object, default: str) -> str:
    """The name of a recipe's format; the default's where it does not override that."""
    options = Options(where, recipe)
    overrides = {
        True: options.take("override_quantized_autocast", True),
        False: options.take("override_nonquantized_autocast", False),
    }
    options.must_be("custom_recipe_factory", None, "write the layers' formats by hand")
    options.note("tp_only_amax_red", False, "there is no tensor parallel group")
    fp8, fp4 = options.take("fp8_quantization_recipe"), options.take("fp4_quantization_recipe")
    fp8_format = options.take("fp8_format", "e4m3")
    kind = fp8 or fp4
    if kind == "delayed" or (fp8 and fp4):
        raise options.refuse("recipe", kind, "Megatron refuses it in such a file, too")
    format = "bf16" if kind is None else recipe_format(kind, fp8_format, options).name
    options.end()
    return format if overrides[linear_format(default).is_fp8] else default


def _read(path_or_text: str | Path) -> Any:
    text = str(path_or_text)
    if isinstance(path_or_text, Path) or "\n" not in text:
        path = Path(path_or_text)
        if not path.is_file():
            raise ValueError(f"path_or_text must be a file or YAML of several lines, got {text!r}")
        text = path.read_text()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"path_or_text must be YAML: {error}") from error


def _mapping(document: Any, key: str) -> Mapping[str, Any]:
    found = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(v, Mapping) for v in found.values()):
        raise ValueError(f"{key} must be a mapping of mappings in a Megatron file, got {found!r}")
    return found
