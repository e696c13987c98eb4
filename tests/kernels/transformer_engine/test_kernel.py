"""Transformer Engine's backend: what it asks of the library, of shapes, of devices, of versions."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import pickle
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fp import convert, revert
from lightning_fp.kernels import NativeKernel
from lightning_fp.kernels.transformer_engine import library as te_library
from lightning_fp.kernels.transformer_engine.kernel import (
    FORMATS,
    Engine,
    TransformerEngineKernel,
    availability,
    use_library,
)
from lightning_fp.kernels.transformer_engine.recipe import RecipeSettings, make_recipe, read_recipe
from lightning_fp.layers import FPLinear, kernel_for, linear_format
from lightning_fp.layers.transformer_engine.setup import check_device
from lightning_fp.numerics import DelayedScaling
from tests.te_stub import fake
from tests.te_stub.fake import State, fake_library

TE = "transformer-engine"


@pytest.fixture
def library() -> Iterator[te_library.Library]:
    with use_library(fake_library()) as _:
        yield te_library.library()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))


def converted(formats: dict[str, str], module: nn.Module | None = None) -> Any:
    module = model() if module is None else module
    return module, convert(module, "fp8-dynamic", formats, backend=TE).precision_map


# --- The library --------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is installed"
)
def test_a_missing_library_is_named_with_its_extra() -> None:
    reasons = availability()
    assert tuple(reasons) == FORMATS
    assert all(reason is not None and "lightning-fp[te]" in reason for reason in reasons.values())
    with pytest.raises(ValueError, match=re.escape('pip install "lightning-fp[te]"')):
        convert(model(), backend=TE, layers={"*": "fp8-dynamic"})


def test_what_the_hardware_cannot_run_is_refused_in_its_own_words(library: Any) -> None:
    assert availability()["fp8-dynamic"] is None
    with pytest.raises(ValueError, match=r"Device compute capability 10\.0 or higher required"):
        convert(model(), backend=TE, layers={"*": "mxfp8"})
    _, table = converted({"*": "fp8-dynamic"})
    with pytest.raises(ValueError, match=r"Device compute capability 10\.0 or higher required"):
        table.set("*", "mxfp8")
    assert not table.known.can_run(table.layers["0"], linear_format("mxfp8"))
    assert table.known.can_run(table.layers["0"], linear_format("fp8-delayed"))


def test_an_old_device_is_refused() -> None:
    def sm80(return_reason: bool = False) -> Any:
        return False, "Device compute capability 8.9 or higher required for FP8 execution."

    with (
        use_library(fake_library(is_fp8_available=sm80)),
        pytest.raises(ValueError, match=r"capability 8\.9 or higher"),
    ):
        convert(model(), backend=TE, layers={"*": "fp8-delayed"})


def test_another_device_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="needs the model on a cpu device, got 'cuda'"):
        check_device("cuda")


def test_delayed_scaling_over_several_devices_is_refused(library: Any) -> None:
    with FakeTensorMode():
        module = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
        for layer, index in zip(module, (0, 0, 1), strict=True):
            weight = torch.empty(32, 32, device=f"cuda:{index}")
            layer.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match="got '0' on cuda:0 and '2' on cuda:1; take 'fp8-dyn"):
            converted({"*": "fp8-delayed"}, module)
        converted({"2": "fp8-dynamic", "*": "fp8-delayed"}, module)


def test_the_older_autocast_is_called_by_its_own_names() -> None:
    calls: list[dict[str, Any]] = []
    old = types.SimpleNamespace(fp8_autocast=lambda **options: calls.append(options))
    library = dataclasses.replace(fake_library(), pytorch=old)
    library.autocast(enabled=True, recipe="r")
    assert calls == [{"enabled": True, "fp8_recipe": "r", "fp8_group": None}]


# --- Recipes ------------------------------------------------------------------------------------


def test_formats_become_recipes(library: Any) -> None:
    for name, cls in (
        ("fp8-delayed", fake.DelayedScaling),
        ("fp8-dynamic", fake.Float8CurrentScaling),
        ("fp8-block", fake.Float8BlockScaling),
    ):
        kernel = kernel_for(linear_format(name), TE, cuda_fp8=True)
        assert isinstance(kernel, TransformerEngineKernel)
        recipe = make_recipe(kernel.settings, DelayedScaling(history_len=7, margin=1))
        assert type(recipe) is cls
        hybrid = name != "fp8-block"
        assert recipe.fp8_format is (fake.Format.HYBRID if hybrid else fake.Format.E4M3)
        if name == "fp8-delayed":
            assert (recipe.amax_history_len, recipe.margin) == (7, 1)


def test_powers_of_two_are_set_where_the_casts_read_them(library: Any) -> None:
    kernel = kernel_for(linear_format("fp8-dynamic[power_of_two=true]"), TE, cuda_fp8=True)
    assert isinstance(kernel, TransformerEngineKernel)
    recipe = make_recipe(kernel.settings, DelayedScaling())
    assert recipe.fp8_quant_fwd_inp.power_2_scale
    assert recipe.fp8_quant_bwd_grad.power_2_scale
    assert not fake.Float8CurrentScaling().fp8_quant_fwd_inp.power_2_scale


def test_a_setting_that_the_version_lacks_is_refused() -> None:
    @dataclasses.dataclass
    class Old(fake.Recipe):
        margin: int = 0

    library = fake_library()
    library.recipes.DelayedScaling = Old
    with pytest.raises(ValueError, match="has no setting amax_compute_algo, amax_history_len"):
        make_recipe(RecipeSettings(kind="delayed"), DelayedScaling(), library)
    with pytest.raises(ValueError, match="has no NVFP4BlockScaling, which 'nvfp4' needs"):
        make_recipe(RecipeSettings(kind="nvfp4"), DelayedScaling(), library)


def test_a_recipe_of_the_users_is_read_and_kept() -> None:
    given = fake.DelayedScaling(amax_history_len=3, fp8_format=fake.Format.E4M3)
    settings = read_recipe(given)
    assert (settings.kind, settings.grad_output) == ("delayed", "e4m3")
    assert make_recipe(settings, DelayedScaling(), fake_library()) is given
    assert settings == read_recipe(copy.copy(given))
    assert settings != read_recipe(fake.DelayedScaling(amax_history_len=4))
    with pytest.raises(ValueError, match="recipe must be one of DelayedScaling"):
        read_recipe("delayed")


def test_a_recipe_of_the_users_trains(library: Any) -> None:
    given = fake.DelayedScaling(amax_history_len=3, margin=1)
    module, table = converted({"*": given})  # pyright: ignore
    assert table.formats() == {"0": "te-delayed", "2": "te-delayed"}
    for _ in range(2):
        with table.forward_context():
            assert State.recipe is given
            module(torch.ones(8, 32)).sum().backward()
        table.after_backward()
        table.step()
    state = table.scale_history.state_dict()
    assert state["history"].shape == (2, 3, 3)
    assert state["scales"][0, 0] == 224  # 448 / 1, and one power of two of margin
    with pytest.raises(ValueError, match="backend must be 'transformer-engine' for a recipe"):
        convert(model(), given)  # pyright: ignore
    for wrong in (fake.DelayedScaling(amax_history_len=0), fake.DelayedScaling(margin=-1)):
        with pytest.raises(ValueError, match="must be"):
            read_recipe(wrong)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("fp8-rowwise", "it has no such recipe; take one of fp8-delayed, fp8-dynamic"),
        ("fp8-dynamic[grad_weight=high]", "in its recipes input and weight are e4m3"),
        ("fp8-dynamic[input=e5m2]", "in its recipes input and weight are e4m3"),
        ("fp8-delayed[power_of_two=true]", "its delayed scaling has scales of any factor"),
    ],
)
def test_what_no_recipe_says_is_refused(format: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel_for(linear_format(format), TE, cuda_fp8=True)


# --- Layers -------------------------------------------------------------------------------------


def test_conversion_keeps_everything_and_comes_back(library: Any) -> None:
    module = model()
    module[0].weight.requires_grad_(False)
    parameters, keys = list(module.parameters()), list(module.state_dict())
    convert(module, "fp8-dynamic", {"*": "fp8-dynamic"}, backend=TE)
    module(torch.randn(8, 32)).sum().backward()
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert list(module.state_dict()) == keys
    assert module[0].weight.grad is None
    assert {type(m) for m in module.modules()} == {nn.Sequential, FPLinear, nn.ReLU}  # not theirs
    assert revert(module) == 2
    assert type(module[0]) is nn.Linear
    assert "engine" not in module[0].__dict__


def test_tied_weights_and_the_meta_device(library: Any) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    module[1].weight = module[0].weight
    converted({"*": "fp8-dynamic"}, module)
    assert module[1].weight is module[0].weight
    module.to_empty(device="cpu")
    module(torch.randn(8, 32)).sum().backward()


def test_a_lent_weight_is_not_kept(library: Any) -> None:
    module, _ = converted({"*": "fp8-dynamic"})
    module(torch.randn(8, 32))
    (theirs,) = module[0].memory._modules.values()
    assert theirs.weight.is_meta
    assert theirs.name == "0"


def test_copies_share_no_scales(library: Any) -> None:
    engine = Engine(32, 64, bias=True, layer="a", sharded=True)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other is not engine
        assert (other.layer, other.sharded, other.history) == ("a", True, None)


def test_ragged_batches_are_padded(library: Any) -> None:
    """With zeros, which change no scale, no sum and no gradient."""
    module, _ = converted({"*": "fp8-dynamic"})
    linear = module[0]
    for shape in ((3, 3, 32), (1, 32), (33, 32)):
        x = torch.randn(shape, requires_grad=True)
        linear.zero_grad()
        output = linear(x)
        output.square().sum().backward()
        assert output.shape == (*shape[:-1], linear.out_features)
        found = [output, x.grad, linear.weight.grad]
        x, weight = x.detach().requires_grad_(), linear.weight.detach().requires_grad_()
        expected = NativeKernel()(x, weight, linear.bias, "")
        expected.square().sum().backward()
        for ours, theirs in zip(found, (expected, x.grad, weight.grad), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert module(torch.randn(0, 32)).shape == (0, 32)


def test_ragged_layers_are_refused_by_name(library: Any) -> None:
    with pytest.raises(ValueError, match="layer '0': out_features must be a multiple of 16"):
        convert(nn.Sequential(nn.Linear(32, 24)), layers={"*": "fp8-dynamic"}, backend=TE)


def test_compiled_code_and_delayed_scaling_are_refused(library: Any) -> None:
    module = model()
    module.compile()
    with pytest.raises(ValueError, match="'fp8-delayed' must not be used in compiled code"):
        convert(module, layers={"*": "fp8-delayed"}, backend=TE)
    _, table = converted({"*": "fp8-dynamic"}, module)
    with pytest.raises(ValueError, match="'fp8-delayed' must not be used in compiled code"):
        table.set("0", "fp8-delayed")


# --- Regions ------------------------------------------------------------------------------------


def test_dynamic_layers_update_nothing_around_them(library: Any) -> None:
    module, table = converted({"0": "fp8-dynamic", "2": "fp8-delayed"})
    x = torch.randn(8, 32, requires_grad=True)
    for step in range(4):
        with table.forward_context():
            loss = module(x).square().mean()
        loss.backward()
        table.after_backward()
        table.step()
        # the first step has no layer under delayed scaling in it yet: it looks for scales
        assert (State.forward_updates, State.backward_updates) == (step + 1, step)
    assert not State.enabled
    assert State.depth == 0


def test_outside_of_a_region_delayed_scaling_says_what_to_do(library: Any) -> None:
    module, _ = converted({"*": "fp8-delayed"})
    with pytest.raises(RuntimeError, match=r"layer '0'.*table\.forward_context\(\).*checkpoint"):
        module(torch.randn(8, 32))


def test_a_layer_that_comes_back_finds_new_scales(library: Any) -> None:
    module, table = converted({"*": "fp8-delayed"})

    def step(size: float) -> list[float]:
        with table.forward_context():
            loss = module(size * torch.ones(8, 32)).square().mean()
        loss.backward()
        table.after_backward()
        table.step()
        return table.scale_history.state_dict()["scales"][0].tolist()

    step(1.0)
    assert step(1.0)[0] == 448
    table.set("0", "bf16")
    table.apply()
    step(8.0)
    table.set("0", "fp8-delayed")
    table.apply()
    assert table.scale_history.state_dict()["layers"] == ["0", "2"]
    assert step(8.0)[0] == 56  # and not 448, under which 8 would be clamped
    assert step(8.0)[0] == 56


def test_one_recipe_for_all_of_delayed_scaling(library: Any) -> None:
    with pytest.raises(ValueError, match="layers under delayed scaling must share one recipe"):
        converted({"0": "fp8-delayed", "2": "fp8-delayed[grad_output=e4m3]"})
