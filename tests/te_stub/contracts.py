"""What this package takes for granted of Transformer Engine, held against its own Python code.

Collected by `tests/kernels/test_transformer_engine_contracts.py` in a process of its own, because
it is made to believe in a GPU.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 (before the stub: it asks torch for CUDA)
import pytest
import torch
from torch import nn

from lightning_fp.format_names import TE_FORMATS
from lightning_fp.kernels.transformer_engine import library as te_library
from lightning_fp.kernels.transformer_engine import recipe as te_recipe
from lightning_fp.kernels.transformer_engine.kernel import use_library
from lightning_fp.kernels.transformer_engine.recipe import RecipeSettings, make_recipe, read_recipe
from lightning_fp.layers.conversion.convert import convert
from lightning_fp.numerics import DelayedScaling
from tests.te_stub import extension, fake

te = extension.install(Path(os.environ["TRANSFORMER_ENGINE"]))

import transformer_engine.common.recipe as recipes  # noqa: E402
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: E402

REAL = te_library.Library(
    pytorch=te,
    recipes=recipes,
    state=FP8GlobalStateManager,
    version="2.20",
    device="cpu",
)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    FP8GlobalStateManager.reset()
    yield
    FP8GlobalStateManager.reset()


def names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_names_and_arguments() -> None:
    assert {"enabled", "recipe", "amax_reduction_group"} <= names(te.autocast)
    assert {"enabled", "fp8_recipe", "fp8_group"} <= names(te.fp8_autocast)
    assert {"in_features", "out_features", "bias", "device", "name"} <= names(te.Linear)
    assert {"function", "kwargs"} <= names(te.checkpoint)
    for cls, ours in ((recipes.DelayedScaling, fake.DelayedScaling),):
        assert set(ours.__dataclass_fields__) <= set(cls.__dataclass_fields__)
    for format, known in TE_FORMATS.items():
        assert "return_reason" in names(getattr(te, known.support)), format


def test_places_of_scales() -> None:
    state = te.quantization.RecipeState
    assert state._FWD_DEFAULT_TENSOR_TYPES == ("input", "weight", "output")
    assert state._BWD_DEFAULT_TENSOR_TYPES == ("grad_output", "grad_input")


def test_recipes_take_anything_and_ours_do_not() -> None:
    recipes.DelayedScaling(amax_history_len=0, no_such_setting=1)  # says nothing
    with pytest.raises(ValueError, match="history_len must be at least 1"):
        DelayedScaling(history_len=0)
    with pytest.raises(ValueError, match="has no setting no_such_setting"):
        te_recipe._strictly(REAL, "delayed", no_such_setting=1)


@pytest.mark.parametrize("kind", ["delayed", "current", "block", "mxfp8", "nvfp4"])
def test_every_kind_is_made_and_read_back(kind: Any) -> None:
    grad_output: Any = "e5m2" if kind in ("delayed", "current") else "e4m3"
    recipe = make_recipe(
        RecipeSettings(kind=kind, grad_output=grad_output), DelayedScaling(history_len=5), REAL
    )
    read = read_recipe(recipe)
    assert (read.kind, read.grad_output) == (kind, grad_output)
    assert recipe.delayed() == (kind == "delayed")
    assert make_recipe(read, DelayedScaling(), REAL) is recipe


def test_powers_of_two_need_more_than_their_argument() -> None:
    assert not recipes.Float8CurrentScaling(use_power_2_scales=True).fp8_quant_fwd_inp.power_2_scale
    ours = make_recipe(RecipeSettings(kind="current", power_of_two=True), DelayedScaling(), REAL)
    assert ours.fp8_quant_fwd_inp.power_2_scale
    assert ours.fp8_quant_fwd_weight.power_2_scale
    assert ours.fp8_quant_bwd_grad.power_2_scale


@pytest.mark.parametrize(
    ("capability", "formats"),
    [
        ((8, 0), set()),
        ((9, 0), {"fp8-delayed", "fp8-dynamic", "fp8-block"}),
        ((10, 0), {"fp8-delayed", "fp8-dynamic", "fp8-block", "mxfp8", "nvfp4"}),
        ((12, 0), {"fp8-delayed", "fp8-dynamic", "fp8-block", "nvfp4"}),
    ],
)
def test_what_runs_where(
    capability: Any, formats: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_engine.pytorch import quantization

    for name in vars(quantization):
        if name.endswith("_SUPPORT"):
            monkeypatch.setattr(quantization, name, None)
    monkeypatch.setattr(extension, "CAPABILITY", [capability])
    reasons = {format: REAL.refusal(format) for format in te_library.FORMATS}
    assert {format for format, reason in reasons.items() if reason is None} == formats
    if capability == (8, 0):
        assert "8.9 or higher" in str(reasons["fp8-dynamic"])


def model(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    widths = (32, 64), (64, 32), (32, 16)
    first, second, third = (nn.Linear(*width, bias=bias) for width in widths)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


def course(library: te_library.Library, formats: dict[str, str], bias: bool) -> Any:
    """Losses, and the state of the scales, of a few steps."""
    module = model(bias)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(16, 32)
    with use_library(library):
        table = convert(module, "fp8-dynamic", formats, backend="transformer-engine").precision_map
        losses: list[float] = []
        for step in range(6):
            with table.forward_context():
                loss = module(x * (1 + step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            table.after_backward()
            table.step()
            losses.append(loss.item())
        state = table.scale_history.state_dict()
    assert not [key for key in module.state_dict() if "extra_state" in key]
    return losses, state


@pytest.mark.parametrize(
    "formats",
    [
        {"*": "fp8-dynamic"},
        {"*": "fp8-delayed"},
        {"0": "fp8-dynamic", "*": "fp8-delayed"},
        {"2": "fp8-dynamic", "4": "bf16", "*": "fp8-delayed"},
    ],
    ids=["dynamic", "delayed", "dynamic first", "mixed"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_its_layers_and_the_stand_in_take_the_same_course(
    formats: dict[str, str], bias: bool
) -> None:
    """Its own forward, backward, regions and updates, with products emulated on the CPU."""
    # It rounds a bias to bf16 where the output is float32, as cuBLAS wants it.
    tolerance = 0.1 if bias else 1e-3
    theirs, their_state = course(REAL, formats, bias)
    stands_in, our_state = course(fake.fake_library(), formats, bias)
    assert theirs == pytest.approx(stands_in, rel=tolerance)
    assert their_state["layers"] == our_state["layers"]
    for name in ("scales", "history"):
        close = {"rtol": 10 * tolerance if bias else tolerance, "atol": 0}
        torch.testing.assert_close(their_state[name], our_state[name], **close)


def test_a_region_of_one_layer_is_not_the_first_of_the_step() -> None:
    delayed = make_recipe(RecipeSettings(kind="delayed"), DelayedScaling(), REAL)
    current = make_recipe(RecipeSettings(kind="current"), DelayedScaling(), REAL)
    with REAL.autocast(enabled=True, recipe=delayed):
        assert REAL.delayed_region
        with REAL.region(current):
            assert not REAL.delayed_region
            assert not FP8GlobalStateManager.is_first_fp8_module()
        assert REAL.delayed_region
        assert FP8GlobalStateManager.is_first_fp8_module()
    assert not FP8GlobalStateManager.is_fp8_enabled()


def test_its_checkpoints_need_pickles_and_ours_do_not() -> None:
    delayed = make_recipe(RecipeSettings(kind="delayed"), DelayedScaling(), REAL)
    theirs = te.Linear(32, 32, device="cpu")
    with REAL.autocast(enabled=True, recipe=delayed):
        theirs(torch.randn(16, 32)).sum().backward()
    state = theirs.state_dict()
    assert state["_extra_state"].numel() > 0
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"):
        theirs.load_state_dict(state)


def test_a_layer_of_theirs_that_comes_back_to_delayed_scaling_is_never_updated_again() -> None:
    """Why an `Engine` has one module for each recipe."""
    delayed = make_recipe(RecipeSettings(kind="delayed"), DelayedScaling(), REAL)
    current = make_recipe(RecipeSettings(kind="current"), DelayedScaling(), REAL)
    theirs = te.Linear(32, 32, device="cpu")

    def step(recipe: Any) -> None:
        with REAL.autocast(enabled=True, recipe=recipe):
            theirs(torch.randn(16, 32)).sum().backward()

    step(delayed)
    assert not torch.equal(theirs.fp8_meta["scaling_fwd"].scale, torch.ones(3))
    with pytest.warns(UserWarning, match="Recipe type changed"):
        step(current)
    with pytest.warns(UserWarning, match="Recipe type changed"):
        step(delayed)
    step(delayed)
    assert torch.equal(theirs.fp8_meta["scaling_fwd"].scale, torch.ones(3))
