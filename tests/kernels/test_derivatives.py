"""Derivatives beyond the first: all of nn.Linear's in high precision, second ones right in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_fp import convert
from lightning_fp.kernels.derivatives import first_derivatives_only
from lightning_fp.layers.statistics_table import StatisticsTable
from tests.helper import FORMATS, kept_bytes, order_db, saved_tensors, sqnr_db

CASTS = [name for name in FORMATS if name not in ("high", "fp32", "bf16", "fp16", "e8m3")]
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 3 * width // 2), nn.Tanh(), nn.Linear(3 * width // 2, width, bias=False)
    )


def loss_of(model: nn.Module, autocast: bool) -> Loss:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return functional_call(model, parameters, (x,)).float().square().sum()

    return loss


def penalty(loss: Loss, parameters: dict[str, Tensor]) -> Any:
    """Of a gradient's length (WGAN-GP), differentiated by input and weights."""
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(parameters, x), x, create_graph=True)
    length = (g.float().norm(dim=1) - 1).square().sum()
    return torch.autograd.grad(length, [x, *parameters.values()], allow_unused=True)


def third(loss: Loss, parameters: dict[str, Tensor]) -> Any:
    weights = list(parameters.values())
    value: Any = [loss(parameters, X)]
    for _ in range(3):
        value = torch.autograd.grad(sum(v.sum() for v in value), weights, create_graph=True)
    return value


def forward_mode(loss: Loss, parameters: dict[str, Tensor]) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        return tuple(forward_ad.unpack_dual(loss(parameters, dual)))


def hessian_vector(loss: Loss, parameters: dict[str, Tensor]) -> Any:
    ones = {name: torch.ones_like(weight) for name, weight in parameters.items()}
    return jvp(grad(loss), (parameters, X), (ones, torch.ones_like(X)))


TRANSFORMS: dict[str, Callable[[Loss, dict[str, Tensor]], Any]] = {
    "grad": lambda loss, parameters: grad(loss)(parameters, X),
    "per sample": lambda loss, parameters: vmap(grad(loss), (None, 0))(parameters, X),
    "vmap": lambda loss, parameters: vmap(lambda row: loss(parameters, row))(X),
    "jvp": lambda loss, parameters: jvp(lambda x: loss(parameters, x), (X,), (X + 1,)),
    "jacrev": lambda loss, parameters: jacrev(loss)(parameters, X),
    "hessian": lambda loss, parameters: hessian(lambda x: loss(parameters, x))(X[0]),
    "forward over reverse": hessian_vector,
    "forward mode": forward_mode,
}
UNDER_VMAP = "per sample", "vmap", "jacrev", "hessian"
BACKWARDS = {"penalty": penalty, "third": third}


@pytest.mark.parametrize("what", [*TRANSFORMS, *BACKWARDS])
@pytest.mark.parametrize(("format", "under_autocast"), [("fp32", True), ("bf16", True)])
def test_high_precision_has_all_of_them_bit_for_bit(
    what: str, format: str, under_autocast: bool
) -> None:
    """A float32 layer under autocast is one of float32 without; one of bf16 nn.Linear itself."""
    results = []
    for converted in (False, True):
        model = network()
        if converted:
            convert(model, "high", {"*": format})
        autocast = under_autocast and (converted or format == "bf16")
        parameters = dict(model.named_parameters())
        transform = {**TRANSFORMS, **BACKWARDS}[what]
        results.append(tree_leaves(transform(loss_of(model, autocast), parameters)))
    assert len(results[0]) == len(results[1]) > 0
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if what == "third" and format == "fp32":  # the same terms, added in another order
            assert sqnr_db(one, other) > 130
        elif one is not None and not torch.equal(one, other):
            # Sums over the widths, and over both again in each derivative.
            assert (what, format) == ("penalty", "fp32")
            assert sqnr_db(one, other) > order_db(*3 * (16, 24))


@pytest.mark.parametrize("what", [*TRANSFORMS, *BACKWARDS])
def test_simulated_formats_are_straight_through_in_all_of_them(what: str) -> None:
    results = []
    for converted in (False, True):
        model = network()
        if converted:
            convert(model, "high", {"*": "e8m14"})
        transform = {**TRANSFORMS, **BACKWARDS}[what]
        found = transform(loss_of(model, False), dict(model.named_parameters()))
        results.append(tree_leaves(found))
    for one, other in zip(*results, strict=True):
        assert (one is None and other is None) or sqnr_db(one, other) > 70


def second_derivatives(
    format: str | None, autocast: bool, checkpointed: bool = False, observed: bool = False
) -> list[Tensor]:
    """Of a gradient penalty and of a Hessian-vector product, by input and weights."""
    model = network(64)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = list(model.parameters())
    table = None if format is None else convert(model, "high", {"*": format}).precision_map
    if observed and table is not None:
        StatisticsTable(table.layers).collect(True)
    found: list[Tensor] = []
    for _ in range(2):  # the second with delayed scales
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *weights], create_graph=True)
        length = (gradients[0].float().norm(dim=1) - 1).square().sum()
        found = list(torch.autograd.grad(length, [x, *weights], retain_graph=True))
        vectors = [torch.ones_like(g) for g in gradients]
        found += torch.autograd.grad(gradients, [x, *weights], vectors)
        if table is not None:
            table.step()
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("format", CASTS)
def test_second_derivatives_are_those_of_high_precision(format: str, autocast: bool) -> None:
    exact = second_derivatives(None, False)
    for one, other in zip(exact, second_derivatives(format, autocast), strict=True):
        assert sqnr_db(one, other) > 15


@pytest.mark.parametrize("format", ["fp8-delayed", "fp8-rowwise", "fp8-block"])
def test_checkpointing_and_observing_change_nothing(format: str) -> None:
    expected = second_derivatives(format, True)
    for options in ({"checkpointed": True}, {"observed": True}):
        for one, other in zip(expected, second_derivatives(format, True, **options), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-block"])
def test_nothing_more_is_kept_for_them(format: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    convert(model, "high", {"*": format})
    with saved_tensors() as kept:
        model(torch.randn(128, 64, requires_grad=True))
    assert kept_bytes(kept, model.parameters()) < 1.1 * 128 * 64


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-block"])
def test_first_backwards_do_no_more_for_them(format: str) -> None:
    class Zeros(TorchDispatchMode):
        shapes: ClassVar[list[tuple[int, ...]]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.zeros.default:
                self.shapes.append(tuple(output.shape))
            return output

    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    convert(model, "high", {"*": format})
    output = model(torch.randn(128, 64, requires_grad=True))
    with Zeros() as zeros:
        output.sum().backward()
    assert (128, 64) not in zeros.shapes


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-block"])
def test_frozen_weights_have_no_place_in_the_graph_for_them(format: str) -> None:
    def nodes(frozen: bool) -> list[str]:
        model = nn.Sequential(nn.Linear(32, 16, bias=False)).requires_grad_(not frozen)
        convert(model, "high", {"*": format})
        x = torch.randn(8, 32, requires_grad=True)
        output = model(x)  # kept: torch 2.11 frees a Function's node with it
        seen, todo = list[str](), [output.grad_fn]
        while todo:
            if (node := todo.pop()) is not None:
                seen.append(type(node).__name__)
                todo += [following for following, _ in node.next_functions]
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(g.sum(), x)
        assert again.abs().sum() > 0
        return seen

    assert "_PlaceBackward" in nodes(frozen=False)
    assert "_PlaceBackward" not in nodes(frozen=True)


def views_under_vmap() -> bool:
    """Whether torch has a rule for a view as another dtype: 2.11 has none, 2.13 has."""
    try:
        vmap(lambda row: row.view(torch.int32))(X)
    except RuntimeError:
        return False
    return True


def warm(format: str, model: nn.Module) -> None:
    """Convert, and let delayed scaling find its scales."""
    table = convert(model, "high", {"*": format}).precision_map
    for _ in range(2):
        model(X).square().sum().backward()
        table.step()
    model.zero_grad()


def test_delayed_scales_are_not_for_transforms_which_record_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    warm("fp8-delayed", model)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    parameters = dict(model.named_parameters())
    large = grad(loss)(parameters, 100 * X)["0.weight"]
    convert(model, "high")
    assert sqnr_db(grad(loss)(parameters, 100 * X)["0.weight"], large) > 15


@pytest.mark.parametrize("what", TRANSFORMS)
@pytest.mark.parametrize("format", CASTS)
def test_casts_are_straight_through_under_transforms(format: str, what: str) -> None:
    if "rowwise" in format and what in UNDER_VMAP and not views_under_vmap():
        pytest.skip(
            "scales of powers of two are made by views that this torch has no vmap rule for"
        )
    results = []
    for converted in (False, True):
        model = network()
        if converted:
            warm(format, model)
        found = TRANSFORMS[what](loss_of(model, converted), dict(model.named_parameters()))
        results.append(tree_leaves(found))
    for one, other in zip(*results, strict=True):
        assert one is None or sqnr_db(one, other) > 15


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", ["fp32", "bf16", *CASTS])
def test_an_ensemble_under_vmap_goes_backward_outside_of_it(format: str, bias: bool) -> None:
    if "rowwise" in format and not views_under_vmap():
        pytest.skip("this torch has no vmap rule for views")
    results: list[list[Tensor]] = []
    for converted in (False, True):
        nets = [nn.Sequential(nn.Linear(16, 32, bias=bias)) for _ in range(3)]
        for seed, net in enumerate(nets):
            torch.manual_seed(seed)
            nn.init.normal_(net[0].weight)
            if converted:
                convert(net, "high", {"*": format})
        stacked, _ = stack_module_state(nets)  # pyright: ignore[reportArgumentType]
        one = nets[0]
        found = vmap(lambda p, one=one: functional_call(one, p, (X,)))(stacked)
        found.float().square().sum().backward()
        results.append([each.grad for each in stacked.values()])
    for plain, ours in zip(*results, strict=True):
        assert sqnr_db(plain, ours) > 15


@pytest.mark.parametrize("format", ["fp32", "fp8-dynamic", "e8m3"])
def test_compiled_transforms_are_the_eager_ones(format: str) -> None:
    """Dynamo itself would return zeros for a gradient of a function without their rules."""
    model = network()
    convert(model, "high", {"*": format})
    per_sample = vmap(grad(loss_of(model, True)), (None, 0))
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    compiled = torch.compile(per_sample, backend="aot_eager")(parameters, X)
    for name, expected in per_sample(parameters, X).items():
        assert torch.equal(compiled[name], expected)


@pytest.mark.parametrize("format", CASTS)
def test_under_transforms_it_is_the_same_product(format: str) -> None:
    model = network(64)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    convert(model, "high", {"*": format})
    output = model(x)
    output.square().sum().backward()
    gradients = [weight.grad for weight in model.parameters()]

    def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = functional_call(model, parameters, (x,))
        return found.square().sum(), found

    found, other_output = grad(loss, has_aux=True)(parameters)
    assert sqnr_db(output, other_output) > 100
    # Of blocks and rows the weight's gradient casts along the tokens where there is no transform.
    least = 60 if format in ("fp8-dynamic", "fp8-delayed", "e4m3") else 20
    for one, other in zip(gradients, found.values(), strict=True):
        assert sqnr_db(one, other) > least


@pytest.mark.parametrize("format", ["fp32", "bf16", "e8m14"])
def test_many_gradients_at_once(format: str) -> None:
    x = torch.randn(4, 16, requires_grad=True)
    results = []
    for converted in (False, True):
        model = network()
        if converted:
            convert(model, "high", {"*": format})
        with torch.autocast("cpu", torch.bfloat16, enabled=format == "bf16"):
            output = model(x)
        rows = torch.eye(64).view(64, 4, 16).to(output.dtype)
        results.append(torch.autograd.grad(output, x, rows, is_grads_batched=True)[0])
    assert sqnr_db(*results) > 70


@pytest.mark.compatibility(
    "wrappers",
    "`is_grads_batched=True`, `vectorize=True` over a backward in FP8",
    "refused",
    "the error names the layer and the rule to write; torch.func works",
)
@pytest.mark.parametrize("format", CASTS)
def test_many_gradients_at_once_of_casts_are_refused(format: str) -> None:
    model = network()
    convert(model, "high", {"2": format})
    output = model(torch.randn(4, 16))
    rows = torch.eye(64).view(64, 4, 16)
    weight = model[2].weight
    kind = "its format cannot go backward under vmap" if format[0] != "e" else None
    if kind is None:
        torch.autograd.grad(output, weight, rows, is_grads_batched=True)
    else:
        with pytest.raises(RuntimeError, match=f"layer '2': {kind}"):
            torch.autograd.grad(output, weight, rows, is_grads_batched=True)


def test_what_others_multiply_has_first_ones_only() -> None:
    x = torch.randn(3, requires_grad=True)
    output = first_derivatives_only(x * 2, "blocks.0.fc1")
    assert torch.equal(torch.autograd.grad(output.sum(), x, retain_graph=True)[0], 2 * x / x)
    with pytest.raises(RuntimeError, match=r"layer 'blocks\.0\.fc1'.*second derivatives.*'bf16'"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
