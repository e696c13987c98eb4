"""Experts of three dimensions as rows of the table, in the models that have them."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from lightning_fp import convert, revert
from lightning_fp.layers.experts.experts import is_switchable_experts
from lightning_fp.layers.statistics_table import StatisticsTable, observable
from lightning_fp.numerics.combining import COLUMN
from tests.experts import MORE, GroupedExperts, batch, loss_of, mixture

EXPERTS = "model.layers.0.mlp.experts"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def experts_of(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


def alone(implementation: str = "eager", name: str = "Mixtral") -> tuple[Any, tuple[Tensor, ...]]:
    """Experts by themselves, and what they are called with."""
    module = experts_of(mixture(name, implementation), -1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    ids = torch.randint(module.num_experts - 1, (10, 2))  # the last one sees no token
    return module, (torch.randn(10, 32, requires_grad=True), ids, torch.rand(10, 2))


@pytest.mark.compatibility(
    "layers", "experts of transformers (Parameters of three dimensions)", "works"
)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_experts_are_reported_in_fp8_and_train(name: str, implementation: str) -> None:
    model = mixture(name, implementation)
    report = convert(model, "fp8-rowwise", example_input={"input_ids": batch()})
    rows = {row.name: row for row in report.layers if row.experts}
    assert list(rows) == [EXPERTS, EXPERTS.replace("0", "1")]
    for row in rows.values():
        assert (row.format, row.reason) == ("fp8-rowwise", None)
        assert row.experts == experts_of(model).num_experts
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses: list[float] = []
    for _ in range(6):
        loss = loss_of(model, batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_every_parameter_that_multiplies_has_a_row_or_a_reason() -> None:
    model = mixture("Qwen2Moe")
    report = convert(model, "fp8-rowwise", example_input={"input_ids": batch()})
    rows = {row.name: row for row in report.layers}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if any(p.dim() > 1 for p in own) and not isinstance(module, nn.Embedding):
            assert name in rows, name
    assert rows["model.layers.0.mlp.gate"].reason == (
        "router: Qwen2MoeTopKRouter stays in high precision"
    )
    assert rows["model.layers.0.mlp.shared_expert_gate"].reason == "router or gate"
    assert rows["model.layers.0.mlp.shared_expert.up_proj"].reason is None
    assert sum(row.flops_share for row in report.layers) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("format", ["fp8-rowwise", "fp8-dynamic"])
@pytest.mark.parametrize("name", MORE)
def test_gradients_against_float64(name: str, format: str, implementation: str) -> None:
    module, (x, ids, weights) = alone(implementation, name)
    exact: Any = copy.deepcopy(module).double()
    exact.config._experts_implementation = "eager"  # torch's grouped product takes no float64
    wide = x.detach().double().requires_grad_()
    expected = exact(wide, ids, weights.double())
    holder = nn.ModuleDict({"experts": module}).train()
    convert(holder, format)
    found = module(x, ids, weights)
    g = torch.randn(10, 32, generator=torch.Generator().manual_seed(2))
    found.backward(g)
    expected.backward(g.double())
    pairs = [(found, expected), (x.grad, wide.grad)]
    pairs += [
        (p.grad, q.grad) for p, q in zip(module.parameters(), exact.parameters(), strict=True)
    ]
    for one, other in pairs:
        one, other = one.detach().double(), other.detach()
        noise, signal = (one - other).square().sum(), other.square().sum()
        assert 10 * torch.log10(signal / noise) > 20
    assert not module.down_proj.grad[-1].any()  # saw no token


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MORE)
def test_in_high_precision_they_compute_what_they_did(name: str, implementation: str) -> None:
    model = mixture(name, implementation)
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    table = convert(model, "fp8-rowwise").precision_map
    model.eval()
    assert torch.equal(model(batch()).logits, plain.eval()(batch()).logits)
    for each in (model, plain):
        each.train()
    table.set("*", "fp32")
    table.apply()
    for each in (model, plain):
        loss_of(each, batch()).backward()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if implementation == "batched_mm" and torch.get_num_threads() > 1:
            # Threads add the tokens' parts of a weight's gradient in the order in which they come.
            torch.testing.assert_close(gradient, expected[name])
        else:
            assert torch.equal(gradient, expected[name])
    assert list(model.state_dict()) == keys
    assert type(experts_of(model, -1)) is not type(experts_of(plain, -1))
    revert(model)
    assert type(experts_of(model, -1)) is type(experts_of(plain, -1))
    assert vars(experts_of(model, -1)).keys() == vars(experts_of(plain, -1)).keys()


def test_one_expert_by_its_name() -> None:
    model = mixture()
    table = convert(model, "fp8-rowwise").precision_map
    assert table.set("*.0.mlp.experts[2]", "bf16", reason="a test") == [f"{EXPERTS}[2]"]
    table.apply()
    formats = table.formats()
    assert (formats[EXPERTS], formats[f"{EXPERTS}[2]"]) == ("fp8-rowwise", "bf16")
    names = list(formats)
    assert names.index(f"{EXPERTS}[2]") == names.index(EXPERTS) + 1
    loss_of(model, batch()).backward()
    table.set(EXPERTS, "fp8-dynamic")  # from here on each row is its own
    table.apply()
    assert table.formats()[f"{EXPERTS}[2]"] == "bf16"
    with table.overridden({f"{EXPERTS}[2]": "fp32", EXPERTS: "fp8-rowwise"}):
        assert table.formats()[f"{EXPERTS}[2]"] == "fp32"
    assert table.formats()[f"{EXPERTS}[2]"] == "bf16"
    assert table.formats()[EXPERTS] == "fp8-dynamic"
    assert table.set("re:.*experts\\[[01]\\]", "bf16") == [
        f"model.layers.{layer}.mlp.experts[{expert}]" for layer in (0, 1) for expert in (0, 1)
    ]
    with pytest.raises(ValueError, match="matches no"):
        table.set("*.experts[7]", "bf16")


def test_an_expert_apart_multiplies_in_its_own_format() -> None:
    module, arguments = alone()
    holder = nn.ModuleDict({"experts": module}).train()
    table = convert(holder, "e8m3").precision_map
    whole = module(*arguments)
    plain = copy.deepcopy(module).eval()(*arguments)
    table.set("experts[0]", "fp32")
    table.apply()
    apart = module(*arguments)
    first = (arguments[1] == 0).all(dim=1)
    others = (arguments[1] != 0).all(dim=1)
    assert first.any()
    torch.testing.assert_close(apart[first], plain[first])
    assert torch.equal(apart[others], whole[others])
    assert not torch.equal(apart[first], whole[first])


def test_rules_name_modules_of_experts_and_single_ones() -> None:
    model = mixture()
    layers = {"*.0.mlp.experts[1]": "bf16", "*.1.mlp.experts": "bf16", "*.experts": "fp8-dynamic"}
    report = convert(model, "fp8-rowwise", layers=layers)
    rows = {row.name: row for row in report.layers if row.experts}
    second = EXPERTS.replace("0", "1")
    assert {name: row.format for name, row in rows.items()} == {
        EXPERTS: "fp8-dynamic",
        f"{EXPERTS}[1]": "bf16",
        second: "bf16",
    }
    assert (rows[EXPERTS].experts, rows[f"{EXPERTS}[1]"].experts) == (3, 1)
    assert rows[f"{EXPERTS}[1]"].flops_share == pytest.approx(rows[EXPERTS].flops_share / 3)
    assert rows[f"{EXPERTS}[1]"].parameters == rows[EXPERTS].parameters / 3
    with pytest.raises(ValueError, match="matches no"):
        convert(mixture(), "fp8-rowwise", layers={"*.experts[9]": "bf16"})


def test_experts_keep_no_history() -> None:
    model = mixture()
    table = convert(model, "fp8-delayed").precision_map
    assert table.formats()[EXPERTS] == "fp8-dynamic"
    assert table.formats()["model.layers.0.self_attn.q_proj"] == "fp8-delayed"
    loss_of(model, batch()).backward()
    table.step()
    table.set("*", "fp8-rowwise")
    assert {change.after for change in table.apply() if change.layer == EXPERTS} == {"fp8-rowwise"}
    table.set("*", "fp8-delayed")
    assert {change.after for change in table.apply() if change.layer == EXPERTS} == {"fp8-dynamic"}
    table.follow(True)
    loss_of(model, batch()).backward()
    table.step()
    assert EXPERTS not in table.scale_history.names


def test_a_table_goes_on_from_its_state() -> None:
    one, other = mixture(), mixture()
    table = convert(one, "fp8-rowwise").precision_map
    table.set("*.1.mlp.experts", "bf16")
    table.set("*.0.mlp.experts[3]", "bf16")
    table.apply()
    again = convert(other, "fp8-rowwise").precision_map
    again.load_state_dict(copy.deepcopy(table.state_dict()))
    assert again.formats() == table.formats()
    losses = [loss_of(model, batch()) for model in (one, other)]
    assert torch.equal(*losses)


def statistics(format: str) -> tuple[Tensor, Any, Tensor]:
    module, arguments = alone()
    holder = nn.ModuleDict({"experts": module}).train()
    table = convert(holder, format).precision_map
    observed = StatisticsTable(observable(table.layers), stride=1)
    observed.collect(True)
    module(*arguments).sum().backward()
    return observed.take(), module, arguments[1]


@pytest.mark.parametrize("format", ["fp8-rowwise", "fp8-dynamic", "fp8-block"])
def test_statistics_of_experts(format: str) -> None:
    table, module, ids = statistics(format)
    input, weight, output, grad_output = table[0]
    at = COLUMN.__getitem__
    assert input[at("numel")] == ids.numel() * (32 + 64)  # of both products
    assert weight[at("numel")] == sum(p.numel() for p in module.parameters())
    assert grad_output[at("numel")] == ids.numel() * (128 + 32)
    largest = max(float(p.detach().abs().max()) for p in module.parameters())
    assert weight[at("amax")] == pytest.approx(largest)
    flops = 3 * 2 * ids.numel() * (32 * 128 + 64 * 32)
    assert input[at("flops")] == flops
    assert not table[0, :, at("nonfinite")].any()
    assert output.any()


def test_the_error_of_the_output_is_of_the_experts_own_products() -> None:
    table, _, _ = statistics("e8m3")
    signal, noise = (float(table[0, 2, COLUMN[name]]) for name in ("signal", "noise"))
    assert 15 < 10 * torch.log10(torch.tensor(signal / noise)) < 40


def test_copies_and_pickles_go_on() -> None:
    model = mixture().train()
    table = convert(model, "fp8-rowwise").precision_map
    table.set("*.experts[1]", "bf16")
    table.apply()
    loss = loss_of(model, batch())
    assert torch.equal(loss_of(copy.deepcopy(model), batch()), loss)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_switchable_experts(experts_of(loaded))
    assert torch.equal(loss_of(loaded, batch()), loss)


def test_the_last_conversion_counts() -> None:
    model = mixture()
    first = convert(model, "fp8-rowwise", layers={"*.experts[1]": "bf16"}).precision_map
    second = convert(model, "fp8-dynamic").precision_map
    assert second.formats()[EXPERTS] == "fp8-dynamic"
    assert not any("[" in name for name in second.formats())
    assert not first.layers


def test_frozen_experts_need_no_gradient_and_pass_one_on() -> None:
    module, (x, ids, weights) = alone()
    module.requires_grad_(False)
    convert(nn.ModuleDict({"experts": module}).train(), "fp8-rowwise")
    module(x, ids, weights).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens: int) -> None:
    module, (x, ids, weights) = alone()
    convert(nn.ModuleDict({"experts": module}).train(), "fp8-rowwise")
    output = module(x[:tokens], ids[:tokens], weights[:tokens])
    assert output.shape == (tokens, 32)
    output.sum().backward()
    assert bool(module.down_proj.grad.any()) == bool(tokens)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("first", ["peft", "convert"])
def test_lora_of_experts(first: str) -> None:
    peft: Any = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_parameters=names, target_modules=[])
    model = mixture()
    if first == "peft":
        model = peft.get_peft_model(model, config)
    report = convert(model, "fp8-rowwise")
    assert sum(row.experts > 0 for row in report.converted) == 2
    if first == "convert":
        model = peft.get_peft_model(model, config)
    loss_of(model.train(), batch()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_under_autocast(implementation: str) -> None:
    model = mixture(implementation=implementation)
    convert(model, "fp8-rowwise")
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch())
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.dtype is torch.float32 for gradient in gradients(model).values())


def test_experts_of_another_dtype_stay() -> None:
    model = mixture()
    experts_of(model).double()
    report = convert(model, "fp8-rowwise")
    row = next(row for row in report.layers if row.name == EXPERTS)
    assert row.reason == "float64, which autocast leaves alone too"


def test_transformer_engine_leaves_experts_alone() -> None:
    from lightning_fp.layers.conversion import decide
    from lightning_fp.layers.format import linear_format

    conversion = decide.Conversion(format=linear_format("bf16"), backend="transformer-engine")
    report = decide.decide(mixture(), conversion)
    assert EXPERTS not in report


# -- torchtitan --------------------------------------------------------------------------------

COUNTS = torch.tensor([5, 0, 11, 3])


@pytest.mark.compatibility(
    "layers", "experts of torchtitan", "works with a note", "named in `layers=`"
)
def test_what_looks_like_torchtitans_is_converted_by_rule() -> None:
    model = nn.ModuleDict({"experts": GroupedExperts(), "out": nn.Linear(32, 32)}).train()
    report = convert(model, "fp8-rowwise")
    row = next(row for row in report.layers if row.name == "experts")
    assert row.reason is not None
    assert row.reason.startswith("looks like experts of torchtitan; name it in layers=")
    x = torch.randn(21, 32)  # two rows of nobody, as padding leaves them
    plain = model["experts"](x, COUNTS)
    report = convert(model, "fp8-rowwise", layers={"experts": "fp8-rowwise"})
    first = report.summary().splitlines()[0]
    assert first.endswith("without those of experts, which an example_input tells")
    report = convert(model, "fp8-rowwise", layers={"experts": "fp32"})
    torch.testing.assert_close(model["experts"](x, COUNTS), plain, rtol=0, atol=0)
    table = report.precision_map
    table.set("experts", "fp8-rowwise")
    table.apply()
    found = model["experts"](x, COUNTS)
    noise = (found - plain).square().sum()
    assert 20 < 10 * torch.log10(plain.square().sum() / noise) < 35
    assert not found[-2:].any()
    found.sum().backward()
    assert not model["experts"].w1.grad[1].any()


def test_another_forward_is_not_taken_for_torchtitans() -> None:
    class Others(GroupedExperts):
        def forward(self, x: Tensor, counts: Tensor, scores: Tensor) -> Tensor:
            return x

    model = nn.ModuleDict({"experts": Others(), "out": nn.Linear(32, 32)})
    with pytest.raises(ValueError, match="matches only modules that cannot be converted"):
        convert(model, layers={"experts": "fp8-rowwise"})


def test_rows_of_nobody_are_zero_and_get_no_gradient() -> None:
    module, (x, ids, weights) = alone("grouped_mm")
    module._is_expert_parallel = True
    with torch.no_grad():
        ids[0] = module.num_experts  # of another rank
        weights[0] = 0
    convert(nn.ModuleDict({"experts": module}).train(), "fp8-rowwise")
    output = module(x, ids, weights)
    assert not output[0].any()
    output.sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1:].any()


@pytest.mark.slow
def test_compiled_it_trains_as_it_does_eagerly() -> None:
    module, arguments = alone("grouped_mm")
    convert(nn.ModuleDict({"experts": module}).train(), "fp8-rowwise")
    eager = module(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(*arguments)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-6)
    found.sum().backward()
    assert module.down_proj.grad.any()


# -- sharded -----------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "itself", [False, True]
)  # the block is sharded, or the experts by themselves
@pytest.mark.parametrize("first", ["convert", "shard"])
def test_under_fsdp2(first: str, itself: bool) -> None:
    model = mixture()
    plain = copy.deepcopy(model)
    convert(plain, "fp8-rowwise")
    loss = loss_of(plain, batch())
    loss.backward()

    def shard() -> None:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer.mlp.experts if itself else layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if first == "shard":
        shard()
    table = convert(model, "fp8-rowwise").precision_map
    if first == "convert":
        shard()
    experts = experts_of(model)
    assert isinstance(experts, FSDPModule) is itself
    found = loss_of(model, batch())
    assert torch.equal(found, loss)
    found.backward()
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        whole: Any = gradient
        assert torch.equal(whole.full_tensor(), expected[name]), name
    table.set("*.experts", "fp32")
    table.apply()
    assert not torch.equal(loss_of(model, batch()), loss)
    revert(model)
    assert isinstance(experts_of(model), FSDPModule) is itself
    assert not is_switchable_experts(experts_of(model))
    loss_of(model, batch()).backward()


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")
@pytest.mark.usefixtures("one_rank")
def test_weights_that_are_sharded_as_they_multiply_run_high_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, (x, ids, weights) = alone()
    expected = copy.deepcopy(module)(x, ids, weights)
    mesh = init_device_mesh("cpu", (1,))
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Replicate()])))
    convert(nn.ModuleDict({"mine": module}).train(), "fp8-rowwise")
    arguments = [distribute_tensor(each, mesh, [Replicate()]) for each in (x.detach(), weights)]
    with caplog.at_level("WARNING", "lightning_fp"):
        try:
            found: Any = module(arguments[0], ids, arguments[1])
        except RuntimeError:  # eager experts of transformers know nothing of DTensor
            found = None
    assert "experts 'mine': their weights are sharded in a way" in caplog.text
    if found is not None:
        torch.testing.assert_close(found.full_tensor(), expected)
