"""`frozen="stored"`: frozen layers keep only FP8, and compute what they did in that format."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_fp import ConversionReport, convert, revert, unstore
from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.layers.stored import is_stored
from lightning_fp.numerics import devices
from tests.helper import saved_tensors, sqnr_db
from tests.kernels.test_float8_free import FLOAT8, Without

FORMATS = ["fp8-delayed", "fp8-dynamic", "fp8-dynamic[weight=e5m2]"]


class LoRA(nn.Module):
    """A frozen base and a low-rank update beside it, as PEFT has them."""

    def __init__(self, inputs: int, outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LoRA(64, 96), nn.GELU(), LoRA(96, 96), nn.GELU(), LoRA(96, 32))


def stored(format: str = "fp8-dynamic", **options) -> tuple[nn.Module, ConversionReport]:
    made = model()
    return made, convert(made, format, frozen="stored", **options)


def nbytes(module: nn.Module) -> int:
    """Of parameters and buffers, whatever they are made of."""
    total = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        inner = tensor.__tensor_flatten__()[0] if isinstance(tensor, StoredWeight) else []
        total += sum(getattr(tensor, n).nbytes for n in inner) if inner else tensor.nbytes
    return total


def run(module: nn.Module, steps: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients of some steps that train the adapters."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    seen: list[Tensor] = []
    for _ in range(steps):
        x = torch.randn(3, 5, 64, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            output = module(x * 1)  # of a leaf autocast would keep one cast for all layers
        output.float().square().mean().backward()
        assert x.grad is not None
        seen += [output.detach(), x.grad]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_outputs_and_gradients_are_those_of_the_unstored_layer_bit_for_bit(
    format: str, dtype: torch.dtype
) -> None:
    plain, (kept, report) = model(), stored(format)
    table = convert(plain, format).precision_map
    assert report.precision_map.formats() == table.formats()
    for _ in range(3):  # delayed scales follow from what was recorded
        for a, b in zip(run(plain, 1, dtype), run(kept, 1, dtype), strict=True):
            assert torch.equal(a, b)
        table.step()
        report.precision_map.step()
    a, b = table.state_dict()["scales"], report.precision_map.state_dict()["scales"]
    assert str(a) == str(b)


@pytest.mark.parametrize("converted_there", [False, True], ids=["moved there", "converted there"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_without_float8_dtypes_it_is_the_same(
    format: str, dtype: torch.dtype, converted_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below sm89 and on MPS; Lightning converts on the host and moves then."""
    expected = run(stored(format)[0], dtype=dtype)
    if converted_there:
        monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
        with Without(FLOAT8):
            kept, _ = stored(format)
    else:
        kept, _ = stored(format)
        monkeypatch.setattr(devices, "CPU_STANDS_IN_FOR", "sm80")
        kept._apply(torch.clone)
    with Without(FLOAT8):
        found = run(kept, dtype=dtype)
        kept.load_state_dict(kept.state_dict())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    weight = kept.get_submodule("0.base_layer").weight
    assert isinstance(weight, StoredWeight)
    assert weight.cast.dtype is torch.uint8


def test_a_layer_takes_a_byte_per_weight() -> None:
    plain, (kept, report) = model(), stored()
    weights = 64 * 96 + 96 * 96 + 96 * 32
    assert report.saved_bytes == 3 * weights
    # the scale and the amax of three layers are what is added
    assert nbytes(plain) - nbytes(kept) == 3 * weights - 3 * 8
    assert report.stored == ("0.base_layer", "2.base_layer", "4.base_layer")
    assert "3 frozen layers keep only their FP8 weight: 0.1 MB less" in report.summary()
    assert "left in high precision: 0,2,4.lora_A, 0,2,4.lora_B (adapter)" in report.summary()


def in_format(plain: nn.Module, format: str) -> nn.Module:
    """The model with its frozen layers, whole, in another format."""
    table = convert(plain, "fp8-dynamic").precision_map
    table.set("*base_layer", format)
    table.apply()
    return plain


def left_of(kept: nn.Module) -> nn.Module:
    """A plain model of the values that are left."""
    plain = model()
    plain.load_state_dict(kept.state_dict())
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["bf16", "e8m3", "fp32", "fp8-rowwise", "high", "mxfp8"])
def test_other_formats_compute_with_the_values_that_are_left(
    format: str, dtype: torch.dtype
) -> None:
    kept, report = stored()
    plain = in_format(left_of(kept), format)
    report.precision_map.set("*base_layer", format)
    report.precision_map.apply()
    assert is_stored(kept[0].base_layer)
    for a, b in zip(run(kept, 2, dtype), run(plain, 2, dtype), strict=True):
        assert torch.equal(a, b)


def test_evaluation_computes_with_the_values_that_are_left() -> None:
    kept, _ = stored()
    plain, x = left_of(kept), torch.randn(7, 64)
    assert torch.equal(kept.eval()(x), plain.eval()(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kept(x), plain(x))


def test_in_high_precision_backward_keeps_no_values() -> None:
    kept, report = stored()
    report.precision_map.set("*base_layer", "high")
    report.precision_map.apply()
    with saved_tensors() as saved:
        kept(torch.randn(7, 64, requires_grad=True))
    whole = [t for t in saved if type(t) is not StoredWeight and t.numel() >= 96 * 32]
    assert not whole
    assert any(type(t) is StoredWeight for t in saved)


def test_the_state_dict_is_the_plain_models() -> None:
    kept, _ = stored()
    state, plain = kept.state_dict(), model()
    assert {key: (type(v), v.dtype, v.shape) for key, v in state.items()} == {
        key: (type(v), v.dtype, v.shape) for key, v in plain.state_dict().items()
    }
    plain.load_state_dict(state)
    again = convert(plain, "fp8-dynamic", frozen="stored")
    assert again.saved_bytes
    assert all(torch.equal(a, b) for a, b in zip(run(kept), run(plain), strict=True))


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_and_is_cast(assign: bool) -> None:
    kept, _ = stored()
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    kept.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert all(is_stored(kept[i].base_layer) for i in (0, 2, 4))
    convert(other, "fp8-dynamic", frozen="stored")
    assert all(torch.equal(a, b) for a, b in zip(run(kept), run(other), strict=True))


def test_revert_gives_linear_layers_of_the_values_that_are_left() -> None:
    kept, _ = stored()
    plain = left_of(kept)
    assert revert(kept) == 9
    assert all(type(kept[i].base_layer) is nn.Linear for i in (0, 2, 4))
    assert type(kept[0].base_layer.weight) is nn.Parameter
    assert not kept[0].base_layer.weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(run(kept), run(plain), strict=True))


def test_adapters_are_merged_after_unstore() -> None:
    kept, _ = stored()
    run(kept)
    layer = kept[2]
    delta = layer.lora_B.weight @ layer.lora_A.weight
    with pytest.raises(ValueError, match=r"layer '2.base_layer'.*unstore\(model, '2.base_layer'\)"):
        layer.base_layer.weight.data += delta  # as PEFT merges
    values = layer.base_layer.weight.dequantised()
    assert unstore(kept, "2.*") == 1
    layer.base_layer.weight.data += delta
    assert torch.equal(layer.base_layer.weight, values + delta)
    assert layer.base_layer.format.name == "fp8-dynamic"
    assert unstore(kept) == 2
    with pytest.raises(ValueError, match="matches no linear layer"):
        unstore(kept, "3.*")


def test_to_unfreeze_a_layer_is_an_error_that_names_it() -> None:
    kept, _ = stored()
    with pytest.raises(ValueError, match=r"layer '0.base_layer': its weight cannot be trained"):
        kept.requires_grad_(True)
    unstore(kept)
    kept.requires_grad_(True)
    run(kept)
    assert kept[0].base_layer.weight.requires_grad


def test_copies_moves_and_dtypes() -> None:
    kept, _ = stored()
    before = [t.clone() for t in run(copy.deepcopy(kept))]
    twin = copy.deepcopy(kept).to("cpu")
    assert all(is_stored(twin[i].base_layer) for i in (0, 2, 4))
    assert all(torch.equal(a, b) for a, b in zip(run(twin), before, strict=True))
    half = copy.deepcopy(kept).to(torch.bfloat16)
    assert half[0].base_layer.weight.dtype is torch.bfloat16
    assert torch.equal(half[0].base_layer.weight.cast, kept[0].base_layer.weight.cast)
    assert half(torch.randn(3, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("format", ["fp8-delayed", "fp8-dynamic"])
def test_on_the_meta_device(format: str, assign: bool) -> None:
    kept, _ = stored(format)
    with torch.device("meta"):
        later = model()
    convert(later, format, frozen="stored")
    assert is_stored(later[0].base_layer)
    if not assign:
        later.to_empty(device="cpu")
    later.load_state_dict(copy.deepcopy(kept.state_dict()), assign=assign)
    assert all(is_stored(later[i].base_layer) for i in (0, 2, 4))
    assert all(torch.equal(a, b) for a, b in zip(run(later), run(kept), strict=True))


def test_the_last_conversion_counts() -> None:
    kept, _ = stored()
    weight = kept[0].base_layer.weight
    convert(kept, "fp8-dynamic", frozen="stored")
    assert torch.equal(kept[0].base_layer.weight.cast, weight.cast)
    assert torch.equal(kept[0].base_layer.weight.scale, weight.scale)
    convert(kept, "fp8-dynamic")
    assert not is_stored(kept[0].base_layer)


def test_what_it_cannot_do_is_refused_before_anything_changes() -> None:
    made = model()
    for format, options in [
        ("fp8-block", {}),
        ("fp8-rowwise", {}),
        ("mxfp8", {}),
        ("fp8-dynamic", {"backend": "torchao"}),
    ]:
        with pytest.raises(ValueError, match=r"'kept' for layer '0.base_layer', .*take 'fp8-dy"):
            convert(made, format, frozen="stored", **options)
    with pytest.raises(ValueError, match="frozen must be one of kept, stored, got 'fp8'"):
        convert(made, frozen="fp8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="without frozen layers in FP8"):
        convert(nn.Sequential(nn.Linear(64, 64)), frozen="stored")
    assert all(type(m) in (nn.Sequential, LoRA, nn.Linear, nn.GELU) for m in made.modules())


def test_frozen_weights_that_others_have_or_that_are_not_finite_are_kept() -> None:
    made = model()
    made[4].base_layer.weight = nn.Parameter(made[2].base_layer.weight[:32], requires_grad=False)
    made.append(nn.Linear(96, 96).requires_grad_(False))
    made[5].weight = made[2].base_layer.weight
    with torch.no_grad():
        made[0].base_layer.weight[3, 3] = torch.inf
    report = convert(made, frozen="stored")
    assert report.stored == ("4.base_layer",)
    assert report.frozen_kept == {
        "0.base_layer": "its weight has inf or NaN",
        "2.base_layer": "its weight is shared with another module",
        "5": "its weight is shared with another module",
    }
    assert "frozen, but kept whole: 0.base_layer (its weight has inf or NaN)" in report.summary()


def test_adapters_of_other_ranks_run_high_and_are_counted() -> None:
    made = nn.Sequential(LoRA(64, 64, rank=8), LoRA(64, 64, rank=16))
    report = convert(made, layers={"*lora_*": "fp8-dynamic"}, frozen="stored")
    rows = {row.name: (row.format, row.reason) for row in report.layers}
    why = "adapter of rank 8, not a multiple of 16"
    assert rows["0.lora_A"] == rows["0.lora_B"] == ("high", why)
    assert rows["1.lora_A"] == rows["1.lora_B"] == ("fp8-dynamic", None)
    assert f"left in high precision: 0.lora_A, 0.lora_B ({why})" in report.summary()
    made(torch.randn(4, 64)).sum().backward()


def test_second_derivatives_and_transforms_are_those_of_whole_weights() -> None:
    kept, _ = stored()
    plain = in_format(left_of(kept), "fp8-dynamic")
    x, direction = torch.randn(5, 64), torch.randn(5, 64)

    def penalty(module: nn.Module) -> Tensor:
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(point).pow(3).sum(), point, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), point)[0]

    assert sqnr_db(penalty(plain), penalty(kept)) > 100
    for module in (plain, kept):
        torch.func.vmap(module)(x)
    _, tangent = torch.func.jvp(kept, (x,), (direction,))
    assert torch.equal(tangent, torch.func.jvp(plain, (x,), (direction,))[1])


def test_blocks_share_compiled_code() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(LoRA(64, 64) for _ in range(4)))
    convert(blocks, frozen="stored")
    expected = run(copy.deepcopy(blocks), 1)
    counter = CompileCounter()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    found = run(blocks, 1)
    assert counter.frame_count == 1
    assert all(sqnr_db(a, b) > 100 for a, b in zip(expected, found, strict=True))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")
@pytest.mark.usefixtures("one_rank")
def test_ddp_has_it_as_it_is_and_fsdp2_is_refused() -> None:
    kept, _ = stored()
    expected = run(copy.deepcopy(kept))
    wrapped = nn.parallel.DistributedDataParallel(kept)
    assert all(torch.equal(a, b) for a, b in zip(run(wrapped), expected, strict=True))
    sharded = model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"for a sharded model, got 'stored': .* is a DTensor"):
        convert(sharded, frozen="stored")
