"""The recipes that come with the package, each a function that says why it is as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least, did_you_mean, unknown
from lightning_fp.layers.histories.auto_scaling import DELAYED_TOKEN_LIMIT
from lightning_fp.recipes.catalogue import CATALOGUE
from lightning_fp.recipes.gate import Gate
from lightning_fp.recipes.recipe import FewBlocks, RolloutRecipe
from lightning_fp.recipes.stage import CONFIGURED, Stage
from lightning_fp.recipes.text import is_path

_ALL_HIGH = {"*": "high"}
_ALL_LOW = {"*": CONFIGURED}
_ENDS_HIGH = {"blocks[0]": "high", "blocks[-1]": "high", "*": CONFIGURED}
"""The first and the last block in high precision: a default of practice, e.g. Megatron-LM's
--first-last-layers-bf16, and of the report on pretraining with NVFP4."""


def _casts(window: int) -> tuple[Gate, ...]:
    """No layer loses too much in its casts: the limits at which `LayerLimit` steps in.

    On the mean of the window: delayed scaling clamps a little more than that in some layer at
    some step of a healthy run.
    """
    return (
        Gate(statistic="clamped_mass/max", below=0.01, window=window, reduce="mean"),
        Gate(statistic="sqnr_db/min", above=15.0, window=window, reduce="mean"),
    )


def _no_fallback(window: int) -> Gate:
    """Nothing was demoted for so long."""
    return Gate(statistic="fallbacks", below=1, window=window, reduce="sum")


def _named(name: str, *stages: Stage, few_blocks: FewBlocks = "refuse") -> RolloutRecipe:
    """A recipe of the catalogue."""
    description = CATALOGUE[name].description
    return RolloutRecipe(name=name, description=description, stages=stages, few_blocks=few_blocks)


def _check(*, share: Mapping[str, float] | None = None, **counts: int | None) -> None:
    """Refuse shares of the run that leave nothing for the stages around, and lengths of none."""
    for name, value in (share or {}).items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be a share of the run, above 0 and below 1, got {value}")
    check_at_least(1, **counts)


@checked
def conservative(*, warmup: float = 0.05, window: int = 500) -> RolloutRecipe:
    """High precision, one block, all but the ends, everything, and high precision at the end.

    For a run that may not fail. Why so: of 188 BF16 runs of a small GPT 18 diverged, within the
    first 5% of training (arXiv 2405.18710, which suggests staged precision too): what goes wrong
    there is not FP8's doing if FP8 begins later. One block in the middle is the least that shows
    what FP8 does to this model. Before the ends follow, gradients must still point where high
    precision's do: a cosine of 0.95, a starting value. The last 10% in high precision close the
    gap of low-precision pretraining (report on NVFP4). Needs ClampMonitor, PrecisionFallback and
    ParityProbe.

    Args:
        warmup: share of the run in high precision at the beginning.
        window: steps that the gates look back, and least length of the stages.
    """
    _check(share={"warmup": warmup}, window=window)
    if warmup >= 0.9:
        raise ValueError(f"warmup must be below 0.9, where the last stage begins, got {warmup}")
    parity = Gate(statistic="parity/grad_cosine", above=0.95, window=window)
    return _named(
        "conservative",
        Stage(name="high", layers=_ALL_HIGH, until={"share": warmup}),
        Stage(
            name="one-block",
            layers={"blocks[50%]": CONFIGURED, "*": "high"},
            until={"steps": window},
            gates=(*_casts(window), _no_fallback(window)),
            on_fail="step_back",
        ),
        Stage(
            name="all-but-ends",
            layers=_ENDS_HIGH,
            until={"steps": 2 * window},
            gates=(*_casts(window), parity, _no_fallback(window)),
            on_fail="step_back",
        ),
        Stage(
            name="all",
            layers=_ALL_LOW,
            until={"share": 0.9},
            gates=(*_casts(window), _no_fallback(window)),
            on_fail="step_back",
        ),
        Stage(name="cooldown", layers=_ALL_HIGH),
        few_blocks="thirds",
    )


@checked
def balanced(*, warmup: float = 0.02, window: int = 100) -> RolloutRecipe:
    """A short start in high precision, all but the first and last block, then everything.

    The one to begin with. Why so: the first steps, in which tensors change fastest, show that the
    run works at all; the first and last blocks are those that practice keeps in high precision
    longest (see `first_last_bf16`), so they come last. The gates' limits are those at which
    PrecisionFallback moves single layers. Needs ClampMonitor and PrecisionFallback.

    Args:
        warmup: share of the run in high precision at the beginning.
        window: steps that the gates look back, and least length of the stage between.
    """
    _check(share={"warmup": warmup}, window=window)
    return _named(
        "balanced",
        Stage(name="high", layers=_ALL_HIGH, until={"share": warmup}),
        Stage(
            name="all-but-ends",
            layers=_ENDS_HIGH,
            until={"steps": window},
            gates=(*_casts(window), _no_fallback(window)),
        ),
        Stage(name="all", layers=_ALL_LOW, gates=_casts(window), on_fail="step_back"),
        few_blocks="thirds",
    )


@checked
def aggressive(*, steps: int = 50, window: int = 50) -> RolloutRecipe:
    """Everything after a few steps, and back if casts clamp.

    For short runs, fine-tuning, and formats that cannot clamp. Why so: a few steps in high
    precision show that the run works at all, and tensors change fastest in them; the gate's limit
    is that at which PrecisionFallback moves single layers. Needs ClampMonitor.

    Args:
        steps: length of the start in high precision.
        window: steps that the gate looks back.
    """
    _check(steps=steps, window=window)
    gate = Gate(statistic="clamped_mass/max", below=0.01, window=window, reduce="mean")
    return _named(
        "aggressive",
        Stage(name="high", layers=_ALL_HIGH, until={"steps": steps}),
        Stage(name="all", layers=_ALL_LOW, gates=(gate,), on_fail="step_back", max_tries=2),
    )


def first_last_bf16() -> RolloutRecipe:
    """The first and the last block in high precision, from beginning to end.

    Why so: sensitive layers in high precision are the oldest advice there is (arXiv 2405.18710
    suggests them; Megatron-LM has --first-last-layers-bf16; pretraining with NVFP4 keeps first
    and last blocks in BF16). Needs no other callback.
    """
    ends_high = Stage(name="ends-high", layers=_ENDS_HIGH)
    return _named("first-last-bf16", ends_high, few_blocks="thirds")


@checked
def bf16_cooldown(*, share: float = 0.9) -> RolloutRecipe:
    """Low precision until near the end, high precision for the last 10%.

    Why so: switching to higher precision for the last 10% closes the gap in loss that
    low-precision pretraining leaves (report on NVFP4). Needs no other callback.

    Args:
        share: share of the run at which high precision takes over.
    """
    _check(share={"share": share})
    return _named(
        "bf16-cooldown",
        Stage(name="low", layers=_ALL_LOW, until={"share": share}),
        Stage(name="cooldown", layers=_ALL_HIGH),
    )


@checked
def delayed_after_dynamic(
    *, window: int = 200, token_limit: int | None = int(DELAYED_TOKEN_LIMIT)
) -> RolloutRecipe:
    """Dynamic scaling first, delayed scaling once it would not have clamped, dynamic in the end.

    Why so: delayed scaling saves a pass over memory, and clamps where a tensor outgrows its
    history, as it does at the beginning; what it would have clamped is measured before it is
    trusted. After about 200B tokens it is known to fail (SwiGLU outliers, arXiv 2409.12517), too
    late for any trial to show. Needs ClampMonitor(what_if=True).

    Args:
        window: steps in a row in which delayed scaling would have clamped next to nothing.
        token_limit: training tokens after which scaling is dynamic again; None: never, for runs
            that are short or have no tokens.
    """
    _check(window=window, token_limit=token_limit)
    what_if = Gate(statistic="what_if_delayed_clamped_mass/max", below=0.01, window=window)
    clamped = Gate(statistic="clamped_mass/max", below=0.01, window=window)
    delayed = Stage(
        name="delayed",
        layers={"*": "fp8-delayed"},
        until={} if token_limit is None else {"tokens": token_limit},
        gates=(clamped,),
        on_fail="step_back",
        max_tries=2,
    )
    again = Stage(name="dynamic-again", layers={"*": "fp8-dynamic"})
    return _named(
        "delayed-after-dynamic",
        Stage(name="dynamic", layers={"*": "fp8-dynamic"}, gates=(what_if,)),
        delayed,
        *(() if token_limit is None else (again,)),
    )


@checked
def fp16_rl(*, k3: float = 1e-3, window: int = 20) -> RolloutRecipe:
    """FP16 for reinforcement learning, and back to BF16 if training and inference part.

    Why so: FP16's three more bits of mantissa make the mismatch between training and inference
    about 24 times smaller, and BF16 runs collapse after it has grown (arXiv 2510.26788); a KL
    below 1e-3 is what NeMo-RL calls acceptable. A few steps in BF16 come first, so that the run
    has its own mismatch to compare with. For FP16Precision; needs MismatchMonitor.

    Args:
        k3: mismatch (the k3 estimate of the KL divergence) that ends FP16.
        window: steps that the gate looks back, and length of the start in BF16.
    """
    _check(window=window)
    if not math.isfinite(k3):
        raise ValueError(f"k3 must be finite, got {k3}")
    gate = Gate(statistic="mismatch/k3_kl", below=k3, window=window, reduce="mean")
    return _named(
        "fp16-rl",
        Stage(name="bf16", layers={"*": "bf16"}, until={"steps": window}),
        Stage(name="fp16", layers={"*": "fp16"}, gates=(gate,), on_fail="step_back"),
    )


RECIPES: Mapping[str, Callable[..., RolloutRecipe]] = {
    "conservative": conservative,
    "balanced": balanced,
    "aggressive": aggressive,
    "first-last-bf16": first_last_bf16,
    "bf16-cooldown": bf16_cooldown,
    "delayed-after-dynamic": delayed_after_dynamic,
    "fp16-rl": fp16_rl,
}
"""Every built-in recipe by its name."""


def names() -> list[str]:
    """The names of the built-in recipes."""
    return list(RECIPES)


@checked
def get(name: str, **options: Any) -> RolloutRecipe:
    """A built-in recipe.

    >>> get("bf16-cooldown", share=0.8).stages[0].until
    {'share': 0.8}

    Args:
        name: see `names`.
        options: of the recipe's function, see there.

    Raises:
        ValueError: if there is no such recipe or option.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    recipe = RECIPES[name]
    known = signature(recipe).parameters
    for option in options:
        if option not in known:
            has = f"; it has {', '.join(known) or 'none'}{did_you_mean(option, known)}"
            raise ValueError(f"recipe {name!r} has no option {option!r}{has}")
    return recipe(**options)


def read(recipe: RolloutRecipe | str | Path) -> RolloutRecipe:
    """The recipe that a user's value stands for.

    Args:
        recipe: a recipe, the name of a built-in one, the path of a YAML file, or YAML text.

    Raises:
        ValueError: if there is no such recipe, or it cannot be.
    """
    if isinstance(recipe, RolloutRecipe):
        return recipe
    if isinstance(recipe, str) and is_path(recipe) and not Path(recipe).suffix:
        return get(recipe)
    return RolloutRecipe.from_yaml(recipe)
