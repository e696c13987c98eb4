"""Conversion in place: the layer stays itself, whatever it multiplies in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fp import convert, revert
from lightning_fp.layers import FPLinear, is_switchable
from lightning_fp.layers.statistics_table import StatisticsTable
from tests.helper import FORMATS, TinyGPT, next_byte_loss, sqnr_db, text_rows


def test_everything_but_the_class_stays() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False)).eval()
    first, calls = model[0], []
    first.weight.requires_grad_(False)
    first.note = "kept"
    first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    first.register_forward_hook(lambda *_: calls.append("post"))
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    parameters, keys = list(model.parameters()), list(model.state_dict())

    convert(model, fp8_eval=True)
    assert isinstance(first, FPLinear)
    assert isinstance(first, nn.Linear)
    assert is_switchable(first)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert not first.training
    assert not first.weight.requires_grad
    assert first.note == "kept"
    model(torch.randn(4, 32, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "backward"]
    assert "format=fp8-dynamic" in repr(first)

    assert revert(model) == 2
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert repr(first) == "Linear(in_features=32, out_features=32, bias=True)"
    plain, kept = vars(nn.Linear(1, 1)).keys(), vars(first).keys()
    assert set(kept) - set(plain) == {"note"}
    assert revert(model) == 0


def test_conversion_is_idempotent_and_the_last_one_counts() -> None:
    model = TinyGPT()
    first = convert(model)
    assert convert(model).precision_map.formats() == first.precision_map.formats()
    again = convert(model, layers={"blocks.0.fc1": "bf16"})
    assert again.precision_map.formats()["blocks.0.fc1"] == "bf16"
    assert again.precision_map.layers["blocks.0.fc1"] is model.blocks[0].fc1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same(how: str) -> None:
    model = TinyGPT()
    convert(model, layers={"blocks.0.fc1": "fp8-rowwise", "blocks.1.fc1": "e8m3"})
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    rows = text_rows(8)
    losses = [next_byte_loss(each, rows) for each in (model, twin)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one is not other
        assert torch.equal(one.grad, other.grad)
    # they are independent of each other
    twin.eval()
    assert model.blocks[0].fc1.training
    revert(twin)
    assert isinstance(model.blocks[0].fc1, FPLinear)
    assert type(twin.blocks[0].fc1) is nn.Linear


def test_tied_weights_stay_tied() -> None:
    model = TinyGPT()
    model.blocks[1].fc1 = model.blocks[0].fc1  # one module, two names
    model.blocks[1].proj.weight = model.blocks[0].proj.weight  # two modules, one Parameter
    convert(model)
    assert model.blocks[1].fc1 is model.blocks[0].fc1
    assert model.blocks[1].proj.weight is model.blocks[0].proj.weight
    next_byte_loss(model, text_rows(4)).backward()
    revert(model)
    assert type(model.blocks[1].fc1) is nn.Linear


@pytest.mark.parametrize("name", FORMATS)
def test_evaluation_is_high_precision_by_default(name: str) -> None:
    linear = nn.Linear(32, 16)
    model, x = nn.Sequential(linear), torch.randn(8, 32)
    convert(model, name, {"0": name}, backend="auto")
    model.eval()
    assert torch.equal(model(x), F.linear(x, linear.weight, linear.bias))


def test_fp8_eval_evaluates_in_the_layers_format() -> None:
    linear = nn.Linear(32, 16)
    model, x = nn.Sequential(linear), torch.randn(8, 32)
    plain = linear(x)
    convert(model, fp8_eval=True)
    training = model(x)
    model.eval()
    assert torch.equal(model(x), training)
    assert not torch.equal(training, plain)


def test_evaluation_takes_any_batch_and_training_an_empty_one() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model)
    for training in (True, False):
        model.train(training)
        for shape in ((0, 32), (1, 32), (32,), (2, 0, 32), (3, 2, 7, 32)):
            assert model(torch.randn(shape)).shape == (*shape[:-1], 16)


def test_a_frozen_eval_submodule_is_evaluated_in_a_plain_loop() -> None:
    model = TinyGPT()
    convert(model)
    model.train()
    model.blocks[0].eval()
    x = torch.randn(2, 4, 32)
    fc1 = model.blocks[0].fc1
    assert torch.equal(fc1(x), F.linear(x, fc1.weight, fc1.bias))
    fc1 = model.blocks[1].fc1
    assert not torch.equal(fc1(x), F.linear(x, fc1.weight, fc1.bias))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_activation_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        convert(model, name, {"*": name})
        x = torch.randn(16, 32, requires_grad=True)
        output = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        output.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_frozen_backbone_keeps_no_activations() -> None:
    from tests.helper import saved_tensors

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    convert(model)
    with saved_tensors() as kept:
        output = model(torch.randn(8, 32))
    assert not output.requires_grad
    assert not kept


def test_the_meta_device_converts() -> None:
    with torch.device("meta"):
        model = TinyGPT()
    report = convert(model)
    assert len(report.converted) == 8
    assert model.blocks[0].fc1.weight.is_meta


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_output_may_be_changed_in_place(format: str, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=bias), nn.ReLU(inplace=True), nn.Linear(32, 32))
    table = convert(model, format).precision_map
    statistics = StatisticsTable(table.layers)
    statistics.collect(True)
    model(torch.randn(16, 32)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("format", FORMATS)
def test_any_output_may_be_changed_in_place(format: str) -> None:
    """As nn.Linear's: by a temperature, a mask, a dropout, of any shape and strides."""
    changes = (
        lambda y: y.div_(0.7),
        lambda y: y[..., :4].mul_(2.0),
        lambda y: F.dropout(y, 0.1, training=True, inplace=True),
        lambda y: y.view(-1, y.shape[-1]).relu_(),
    )
    inputs = torch.randn(8, 32), torch.randn(2, 4, 32), torch.randn(2, 32, 4).mT, torch.randn(32)
    for bias in (False, True):
        model = nn.Sequential(nn.Linear(32, 64, bias=bias))
        convert(model, "high", {"*": format})
        for x in inputs:
            for change in changes:
                with torch.autocast("cpu", torch.bfloat16):
                    output = model(x)
                change(output)
                output.float().square().mean().backward()


@pytest.mark.parametrize("format", FORMATS)
def test_inference_mode_and_strides_change_nothing(format: str) -> None:
    model = nn.Sequential(nn.Linear(32, 64))
    convert(model, "high", {"*": format}, fp8_eval=True)
    model.eval()
    x = torch.randn(2, 32, 5)
    expected = model(x.mT.contiguous())
    with torch.inference_mode():
        output = model(x.mT)
        assert torch.equal(output, expected)
        output += 1


class TestForwardsOfTheInstance:
    """`linear.forward = wrapped`, as Accelerate's hooks do."""

    def test_one_from_before_the_conversion_is_left_alone_and_said(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        forward = model[0].forward
        model[0].forward = lambda x: forward(x) * 2
        report = convert(model)
        assert list(report.precision_map.formats()) == ["1"]
        assert [row.name for row in report.converted] == ["1"]
        assert "forward of its own" in str(report.layers[0].reason)
        x = torch.randn(4, 32)
        assert torch.equal(model[0](x), 2 * F.linear(x, model[0].weight, model[0].bias))
        with pytest.raises(ValueError, match="forward of its own"):
            convert(model, layers={"0": "fp8-dynamic"})

    def test_one_from_after_it_runs_in_the_format_and_outlives_it(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32))
        convert(model)
        forward = model[0].forward
        model[0].forward = lambda x: forward(x) * 2
        x = torch.randn(4, 32)
        plain = 2 * F.linear(x, model[0].weight, model[0].bias)
        assert 20 < sqnr_db(plain, model(x)) < 40
        assert convert(model).precision_map.formats() == {"0": "fp8-dynamic"}
        assert 20 < sqnr_db(plain, model(x)) < 40
        revert(model)
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_dtypes_that_autocast_leaves_alone(dtype: torch.dtype, format: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, dtype=dtype))
    report = convert(model, format, {"*": format})
    assert list(report.precision_map.formats()) == ["0"]
    assert "autocast leaves alone" in str(report.layers[1].reason)
    x = torch.randn(4, 32, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model[1](x)
    assert torch.equal(output, F.linear(x, model[1].weight, model[1].bias))
    model[0].to(torch.float64)  # after the conversion too
    x = torch.randn(4, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))


@pytest.mark.compatibility("layers", "jagged inputs", "works")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("format", ["fp32", "fp8-dynamic", "fp8-delayed", "fp8-rowwise"])
def test_jagged_inputs_are_their_rows(format: str, compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 64))
    convert(model, "high", {"*": format})
    parts = [torch.randn(3, 32), torch.randn(5, 32)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    expected = model(torch.cat(parts))
    if compiled:
        model.compile(backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        output = model(jagged)
    assert torch.equal(output.values(), expected)
    assert output.shape == F.linear(jagged, model[0].weight).shape
    output.values().sum().backward()
    assert model[0].weight.grad is not None


def test_other_layouts_run_in_high_precision_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model, "high", {"0": "fp8-dynamic"})
    dense = torch.randn(8, 32).relu()
    expected = F.linear(dense, model[0].weight, model[0].bias)
    for _ in range(2):
        torch.testing.assert_close(model(dense.to_sparse()), expected)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["layer '0': its input is sparse_coo: multiplied in high precision"]


@pytest.mark.filterwarnings("ignore:(?s).*deprecated")
@pytest.mark.parametrize("format", ["fp32", "fp8-dynamic", "fp8-delayed", "fp8-rowwise"])
@pytest.mark.parametrize(
    "reparametrize",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
)
def test_weights_of_a_parametrization_are_made_once_a_call(
    reparametrize: Callable[[nn.Module], nn.Module], format: str
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 16, bias=False))
    model = copy.deepcopy(plain)
    convert(model, "high", {"*": format})
    for each in (plain, model):
        torch.manual_seed(1)
        reparametrize(each[0])
    x = torch.randn(8, 32)
    for _ in range(2):
        expected, output = plain(x), model(x)
    assert sqnr_db(expected, output) > 20
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for name, value in plain.state_dict().items():  # power iterations keep their vectors there
        assert torch.equal(model.state_dict()[name], value), name


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.compatibility("layers", "parametrizations, made after the conversion too", "works")
def test_a_layer_parametrized_after_the_conversion_stays_one_of_the_table() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 16))
    model = copy.deepcopy(plain)
    convert(model, "fp8-dynamic", {"*": "fp8-dynamic"})
    for each in (plain, model):
        nn.utils.parametrize.register_parametrization(each[0], "weight", Doubled())
    x = torch.randn(8, 32)
    report = convert(model, "fp8-rowwise", {"*": "fp8-rowwise"})  # another table takes it over
    assert [row.format for row in report.layers if row.name == "0"] == ["fp8-rowwise"]
    assert 20 < sqnr_db(plain(x), model(x)) < 60
    assert revert(model) == 1
    assert torch.equal(model(x), plain(x))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


@pytest.mark.compatibility(
    "wrappers",
    "`torch.ao.quantization`",
    "refused",
    "takes a plain copy: `revert(copy.deepcopy(model))`",
)
@pytest.mark.filterwarnings("ignore:(?s).*deprecated")
def test_what_must_find_a_plain_linear_is_told_how_to_get_one() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    convert(model)
    with pytest.raises(ValueError, match=r"layer '0': torch\.ao\.quantization.*revert\(plain\)"):
        torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})
    assert isinstance(model[0], FPLinear)
    plain = copy.deepcopy(model)
    revert(plain)
    quantised = torch.ao.quantization.quantize_dynamic(plain.eval(), {nn.Linear})
    assert not isinstance(quantised[0], nn.Linear)


@pytest.mark.compatibility(
    "wrappers",
    "`torch.jit.script`, `to_torchscript()`",
    "works with a note",
    "makes the plain model, in high precision",
)
@pytest.mark.filterwarnings("ignore:(?s).*deprecated")
@pytest.mark.parametrize("format", ["bf16", "fp8-delayed", "fp8-dynamic", "fp8-rowwise"])
def test_torch_script_makes_the_plain_model_of_it_and_leaves_it_as_it_is(format: str) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
    plain, x = copy.deepcopy(model), torch.randn(8, 32)
    convert(model, layers={"*": format})
    before = model(x)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), plain(x))
    assert [type(layer) for layer in model] == [FPLinear, nn.ReLU, FPLinear]
    assert torch.equal(model(x), before)


class TestLazy:
    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(16))

    @pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-delayed", "fp8-rowwise", "e8m3"])
    def test_becomes_a_layer_of_the_table_with_its_first_batch(self, format: str) -> None:
        x, lazy = torch.randn(8, 24), self.model()
        table = convert(lazy, format, {"*": format}).precision_map
        for _ in range(3):
            output = lazy(x)
            output.sum().backward()
            table.step()
        assert [type(m) for m in (lazy[0], lazy[2])] == [FPLinear, FPLinear]
        assert table.formats() == {"0": format, "2": format}
        hidden = F.linear(x, lazy[0].weight, lazy[0].bias).relu()
        exact = F.linear(hidden, lazy[2].weight, lazy[2].bias)
        assert 10 < sqnr_db(exact, output) < 60  # in low precision, and right

    def test_is_lazy_again_if_it_is_turned_back_before(self) -> None:
        lazy = self.model()
        convert(lazy)
        assert revert(lazy) == 2
        assert [type(m).__name__ for m in (lazy[0], lazy[2])] == ["LazyLinear", "LazyLinear"]
        lazy(torch.randn(8, 24))
        assert type(lazy[0]) is nn.Linear
