"""Whatever a public constructor is given: it is accepted, or one line names what is wrong."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_fp as fp
from lightning_fp import fabric, recipes
from lightning_fp.argument_types import checked
from lightning_fp.layers import AutoScaling, linear_format
from lightning_fp.loop import PrecisionLoop
from lightning_fp.metrics import LossSpikeScore, TrainingInferenceMismatch
from lightning_fp.numerics import float_format
from lightning_fp.rl import Correction, SampleOrigin, correction
from lightning_fp.stability import BatchRing, MismatchDetector, Snapshots
from lightning_fp.study import SpikeRule


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def loop(**options: Any) -> PrecisionLoop:
    model = small_model()
    return PrecisionLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


loop.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
    [
        each
        for name, each in inspect.signature(PrecisionLoop).parameters.items()
        if name not in ("model", "optimizer", "example_input")
    ]
)


def converted(format: Any, layers: Any, backend: Any, frozen: Any, quantise_like: Any) -> Any:
    return fp.convert(
        small_model(), format, layers, backend=backend, frozen=frozen, quantise_like=quantise_like
    )


def gate(statistic: Any, below: Any = 1.0, above: Any = None, **options: Any) -> fp.Gate:
    return fp.Gate(statistic=statistic, below=below, above=above, **options)


gate.__signature__ = inspect.signature(fp.Gate)  # pyright: ignore[reportFunctionMemberAccess]


def stage(**options: Any) -> fp.Stage:
    return fp.Stage(**{"name": "one", "layers": {"*": "high"}, **options})


MADE: Mapping[str, Callable[..., Any]] = {
    **{
        each.__name__: each
        for each in (
            fp.FP8Precision,
            fp.FP16Precision,
            fp.ClampMonitor,
            fp.EvaluationGap,
            fp.FP16Monitor,
            fp.LossRecorder,
            fp.MismatchMonitor,
            fp.ParityProbe,
            fp.PrecisionFallback,
            fp.StabilityMonitor,
            fp.StagedRollout,
            fp.DelayedScaling,
            fp.DivergenceDetector,
            fp.DynamicScaling,
            fp.FallbackPolicy,
            fp.LayerLimit,
            fp.LinearFormat,
            fp.LossScaling,
            fp.PrecisionMap,
            fp.RolloutRecipe,
            fp.Stage,
            fp.half_policy,
            fp.precision_plugin,
            fp.recommend_scaling,
            AutoScaling,
            BatchRing,
            Correction,
            LossSpikeScore,
            MismatchDetector,
            SampleOrigin,
            Snapshots,
            SpikeRule,
            TrainingInferenceMismatch,
            correction,
            float_format,
            linear_format,
            recipes.FormatEvidence,
            recipes.get,
            *(getattr(recipes, name) for name in ("aggressive", "balanced", "bf16_cooldown")),
            *(getattr(recipes, name) for name in ("conservative", "delayed_after_dynamic")),
            recipes.fp16_rl,
        )
    },
    "PrecisionLoop": loop,
    "Gate": gate,
    "convert": converted,
    "fabric.FP8Precision": fabric.FP8Precision,
    "fabric.FP16Precision": fabric.FP16Precision,
}
"""Everything that a user makes, by name."""

WORDS = {"name": ("format", "scaling", "recipe", "correction"), "value": ("format",)}
"""Other words for an argument, where it is a thing's name."""

MEANT = (
    *("dynamic", "delayed", "auto", "fp8-rowwise", "bf16", "e8m3", "mxfp8", "high", "none"),
    *("bf16-mixed", "16-mixed", "32-true", "native", "torchao", "te", "max", "verl", "raise"),
    *("stored", "bf16-export", "balanced", "log", "tensor", "block", "worst", "mean", "token"),
)
"""What is right somewhere."""

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**63, 2**70, -(2**70), 10**400]),
    st.floats(width=32),
    st.sampled_from([1e308, 5e-324, -0.0]),
    st.sampled_from(MEANT),
    st.text(max_size=6),
    st.sampled_from(["a\nb", "\0", "*", "re:(", "[", "blocks[", "fp8-dynamic[input=", "e99m99"]),
    st.binary(max_size=3),
    st.lists(st.sampled_from(["*", "a", 3, None]), max_size=2),
    st.dictionaries(
        st.sampled_from(["*", "0", "re:(", 3]), st.sampled_from([*MEANT, 3, None]), max_size=2
    ),
    st.builds(object),
    st.just(torch.float16),
    st.just(torch.zeros(2)),
    st.just(float("nan")),
    st.just({"steps": 3}),
    st.just(fp.DelayedScaling(history_len=3)),
    st.just(fp.LossScaling()),
    st.just(int),
)


def arguments(make: Callable[..., Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the arguments; those without a default always, those with one also as they are."""
    needed: dict[str, st.SearchStrategy[Any]] = {}
    others: dict[str, st.SearchStrategy[Any]] = {}
    for name, parameter in inspect.signature(make).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            others["wholly_unknown"] = odd
        elif parameter.default is parameter.empty:
            needed[name] = odd
        else:
            others[name] = st.just(parameter.default) | odd
    return st.fixed_dictionaries(needed).flatmap(
        lambda given: (
            st.lists(st.sampled_from(sorted(others)), max_size=3, unique=True).flatmap(
                lambda names: st.fixed_dictionaries({name: others[name] for name in names}).map(
                    lambda more: {**given, **more}
                )
            )
            if others
            else st.just(given)
        )
    )


def is_refused(
    make: Callable[..., Any], options: Mapping[str, Any], names: Iterable[str] = ()
) -> bool:
    """Whether it is; what refuses says in one line which argument it is about.

    Args:
        make: a constructor.
        options: what it is given.
        names: of the arguments that it may be about; by default all that there are.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(**options)
    except (ValueError, TypeError) as error:
        said = str(error)
        names = names or {*inspect.signature(make).parameters, *options}
        words = [word for name in names for word in (name, *WORDS.get(name, ()))]
        assert any(re.search(rf"\b{re.escape(word)}", said) for word in words), said
        assert "\n" not in said
        assert len(said) < 1500
        return True
    return False


def check(name: str, data: st.DataObject) -> None:
    make = MADE[name]
    is_refused(make, data.draw(arguments(make)))


QUIET = settings(deadline=2000, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("name", MADE)
@settings(QUIET, max_examples=20)
@given(data=st.data())
def test_any_arguments(name: str, data: st.DataObject) -> None:
    check(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@settings(QUIET, max_examples=1000)
@given(data=st.data())
def test_a_thousand_arguments(name: str, data: st.DataObject) -> None:
    check(name, data)


def right_for(make: Callable[..., Any]) -> dict[str, Any]:
    """What is right for the arguments without a default."""
    right = {
        "name": "balanced" if make is recipes.get else "dynamic",
        "layers": {"*": "high"},
        "stages": (stage(),),
        "statistic": "loss",
        "kind": "masked",
        "format": "fp8-dynamic",
        "backend": "auto",
        "frozen": "kept",
        "quantise_like": None,
        "passed": True,
        "failed": 0,
        "runs": 1,
        "steps": 1,
        "value": "dynamic",
    }
    parameters = inspect.signature(make).parameters.items()
    return {n: right[n] for n, p in parameters if p.default is p.empty and n in right}


@pytest.mark.parametrize("name", MADE)
def test_numbers_of_numpy_and_torch_are_numbers(name: str) -> None:
    """In place of each default that is a number or a truth value."""
    make = MADE[name]
    given = right_for(make)
    for argument, parameter in inspect.signature(make).parameters.items():
        value = given.get(argument, parameter.default)
        if isinstance(value, (bool, int, float)):
            for same in (torch.tensor(value), np.asarray(value), np.asarray(value)[()]):
                assert not is_refused(make, {**given, argument: same})


def test_what_arrives_is_pythons_own() -> None:
    """So that it can be written to YAML, JSON and checkpoints."""
    made = stage(until={"steps": np.int64(5), "loss": torch.tensor(2.0)}, max_tries=np.int32(2))
    recipe = fp.RolloutRecipe(name="own", stages=(made, stage(name="two")))
    assert fp.RolloutRecipe.from_yaml(recipe.to_yaml()) == recipe
    assert type(fp.DelayedScaling(history_len=torch.tensor(4)).history_len) is int

    @checked
    def taken(flag: bool, number: float | None, tensor: float | torch.Tensor) -> tuple[Any, ...]:
        return flag, number, tensor

    one = torch.tensor(1.0)
    flag, number, tensor = taken(np.True_, np.float32(0.5), one)
    assert (flag, type(number), tensor is one) == (True, float, True)
    with pytest.raises(ValueError, match=r"history_len must be a whole number, got tensor\(2\.5"):
        fp.DelayedScaling(history_len=torch.tensor(2.5))
    with pytest.raises(ValueError, match="fp8_eval must be True or False, got tensor"):
        fp.FP8Precision(fp8_eval=torch.zeros(2))
    with pytest.raises(ValueError, match="fp8_eval must be True or False, got "):
        fp.FP8Precision(fp8_eval=torch.tensor(1, device="meta"))


@pytest.mark.parametrize("name", MADE)
def test_no_argument_takes_just_anything(name: str) -> None:
    """Each alone, beside what is right for the others."""
    make = MADE[name]
    parameters = inspect.signature(make).parameters
    given = right_for(make)
    taken = [
        argument
        for argument, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
        and not is_refused(make, {**given, argument: object()}, [argument])
    ]
    assert taken == []
