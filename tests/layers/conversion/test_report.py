"""ConversionReport: rows, shares of FLOPs, JSON and the text a user reads."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp import ConversionReport, convert
from lightning_fp.layers.conversion.flops import counting_flops
from lightning_fp.layers.conversion.report import LayerReport
from tests.helper import TinyGPT, text_rows


class Vision(nn.Module):
    """A convolution, attention in both of torch's ways, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.qkv = nn.Linear(32, 96)
        self.fc = nn.Linear(32, 32)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.fc(F.scaled_dot_product_attention(q, k, v))


def test_rows_without_an_example() -> None:
    report = convert(TinyGPT())
    assert isinstance(report, ConversionReport)
    assert [layer.name for layer in report.layers[:4]] == [
        f"blocks.0.{name}" for name in ("qkv", "proj", "fc1", "fc2")
    ]
    fc1 = report.layers[2]
    assert (fc1.format, fc1.kernel, fc1.reason) == ("fp8-dynamic", "native (emulated)", None)
    assert fc1.parameters == 32 * 64 + 64
    head = report.layers[-1]
    assert (head.name, head.format, head.kernel) == ("lm_head", "high", "nn.Linear")
    assert head.reason == "output head"
    assert sum(layer.flops_share for layer in report.layers) == pytest.approx(1)
    linear = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 64)
    assert report.flops_share == pytest.approx(linear / (linear + 32 * 256))
    assert not report.measured
    assert len(report.converted) == 8


def test_shares_of_the_model_with_an_example() -> None:
    model = Vision()
    model.fc.eval()
    report = convert(model, example_input=torch.randn(2, 3, 32, 32))
    assert report.measured
    tokens, width = 2 * 64, 32
    flops = {
        "patch": 2 * tokens * width * 3 * 16,
        # in and out projection, and the products of queries, keys and values
        "attention": 2 * tokens * width * 4 * width + 2 * 2 * 2 * 64 * 64 * width,
        "attention.out_proj": 0,  # its weight is used by the parent directly
        "qkv": 2 * tokens * width * 3 * width,
        "fc": 2 * tokens * width * width,
    }
    whole = sum(flops.values()) + 2 * 2 * 2 * 64 * 64 * width
    assert {layer.name for layer in report.layers} == set(flops)
    for layer in report.layers:
        assert layer.flops_share == pytest.approx(flops[layer.name] / whole), layer.name
    assert report.flops_share == pytest.approx((flops["qkv"] + flops["fc"]) / whole)
    # measuring leaves no trace
    assert not model.fc.training
    assert model.qkv.training
    assert not model.qkv._forward_hooks


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_forms_of_an_example(form: str) -> None:
    tokens = text_rows(2)[:, :-1]
    example = {"tensor": tokens, "tuple": (tokens,), "dict": {"tokens": tokens}}[form]
    report = convert(TinyGPT(), example_input=example)
    assert report.measured
    assert 0.4 < report.flops_share < 0.9


def test_measuring_on_the_meta_device_and_the_random_state() -> None:
    with torch.device("meta"):
        model = TinyGPT(dropout=0.5)
    before = torch.get_rng_state()
    assert convert(model, example_input=text_rows(2)[:, :-1]).measured
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_of_a_torch_transformer_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    report = convert(nn.TransformerEncoder(layer, 2), example_input=torch.randn(2, 8, 32))
    # per token and layer: in and out projection, scores and sums of 8 keys, two linear layers
    whole = 2 * (4 * 32 * 32 + 2 * 8 * 32 + 2 * 32 * 64)
    linear1 = next(row for row in report.layers if row.name == "layers.1.linear1")
    assert linear1.flops_share == pytest.approx(2 * 32 * 64 / (2 * whole))
    assert report.flops_share == pytest.approx(2 * 2 * 32 * 64 / whole)
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_a_layer_that_runs_twice() -> None:
    linear = nn.Linear(32, 32)
    model = nn.Sequential(linear, linear)
    with counting_flops(model) as flops:
        model(torch.randn(8, 32))
    assert flops["0"] == flops[""] == 2 * 2 * 8 * 32 * 32


def test_json() -> None:
    report = convert(TinyGPT())
    data = json.loads(report.to_json())
    assert data["measured"] is False
    assert data["flops_share"] == pytest.approx(report.flops_share)
    assert data["layers"][-1] == {
        "name": "lm_head",
        "format": "high",
        "kernel": "nn.Linear",
        "parameters": 8192,
        "flops_share": report.layers[-1].flops_share,
        "reason": "output head",
        "padding": 0.0,
    }


def test_summary_says_what_runs_and_what_was_left_alone() -> None:
    class Model(TinyGPT):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3)

    report = convert(Model(), layers={"blocks.1.fc?": "fp8-rowwise"})
    assert str(report) == report.summary()
    assert report.summary().splitlines() == [
        "8 of 9 linear layers in low precision, 66.7% of its linear layers' FLOPs,"
        " which hold 74% of its parameters",
        "  fp8-dynamic: 6 layers, kernel native (emulated)",
        "  fp8-rowwise: 2 layers, kernel torchao (emulated)",
        "  left in high precision: lm_head (output head)",
        "  left alone: conv (Conv1d: only linear layers are converted)",
    ]


def test_summary_shortens_long_lists_and_names_a_model_that_is_one_layer() -> None:
    heads = nn.ModuleDict(
        {f"head{i}": nn.ModuleDict({"head": nn.Linear(32, 32)}) for i in range(6)}
    )
    heads["body"] = nn.Linear(32, 32)
    text = convert(heads).summary()
    assert "head0.head, head1.head, head2.head, head3.head and 2 more (output head)" in text
    text = convert(nn.Linear(32, 32), layers={"": "bf16"}).summary()
    assert "left in bf16: (the model itself) (rule '': 'bf16')" in text


class Sequence(nn.Module):
    """A core that is no linear layer, and a small projection."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.proj = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        core = self.core
        hidden = core(x, x) if isinstance(core, nn.Bilinear) else core(x)
        return self.proj(hidden[0] if isinstance(hidden, tuple) else hidden)


class Experts(nn.Module):
    """As mixture-of-experts models have them: one Parameter of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 64))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        split = rows.view(4, -1, 16)
        return torch.bmm(split, self.weight).view(*x.shape[:-1], 64)


class Einsum(nn.Module):
    """Several matrices, of which torch sums those over an index of their own before it multiplies.

    Args:
        equation: of two operands, the input "btd" and the weight "edh".
    """

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(torch.randn(4, 16, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum(self.equation, x, self.weight)
        return y if y.dim() == 3 else y.mean(-2)


CORES = {
    # multiplications and additions of a token, by hand
    "LSTM": (lambda: nn.LSTM(16, 64, num_layers=2, batch_first=True), 8 * 64 * (16 + 64 + 128)),
    "GRU": (lambda: nn.GRU(16, 32, bidirectional=True, batch_first=True), 12 * 32 * (16 + 32)),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 64), 2 * 64 * 16 * 17),
    "Experts": (Experts, 2 * 16 * 64),
    # NumPy's einsum_path counts all four matrices in each of them
    "Einsum": (lambda: Einsum("btd, edh -> bth"), 4 * 2 * 16 * 64),
    "Einsum (all kept)": (lambda: Einsum("btd,edh->bteh"), 4 * 2 * 16 * 64),
    "Einsum (ellipsis)": (lambda: Einsum("...d,edh->...h"), 4 * 2 * 16 * 64),
}


@pytest.mark.parametrize("name", CORES)
def test_what_is_no_linear_layer_has_its_share_and_its_row(name: str) -> None:
    make, per_token = CORES[name]
    report = convert(Sequence(make()), example_input=torch.randn(4, 8, 16))
    own = 2 * 64 * 16
    assert report.flops_share == pytest.approx(own / (own + per_token))
    row = next(row for row in report.layers if row.name == "core")
    assert row.flops_share == pytest.approx(per_token / (own + per_token))
    kind = name.partition(" ")[0]
    assert row.reason == f"{'a' if kind in ('GRU', 'Bilinear') else 'an'} {kind}, not an nn.Linear"
    assert kind in report.summary()


def test_a_share_that_is_not_the_models_says_of_what_it_is() -> None:
    model = Sequence(nn.LSTM(16, 64, batch_first=True))
    parameters = sum(p.numel() for p in model.parameters())
    report = convert(model)
    assert report.flops_share == 1.0
    assert report.linear_parameters == pytest.approx((64 * 16 + 16) / parameters)
    first = report.summary().splitlines()[0]
    assert first.endswith("100.0% of its linear layers' FLOPs, which hold 5% of its parameters")


def test_what_multiplied_nothing_has_no_row() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 16))
            self.proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x + self.table)

    assert [row.name for row in convert(Positions()).layers] == ["", "proj"]
    measured = convert(Positions(), example_input=torch.randn(4, 8, 16))
    assert [row.name for row in measured.layers] == ["proj"]
    assert measured.flops_share == 1.0


def test_nothing_to_convert_names_what_multiplies_instead() -> None:
    with pytest.raises(
        ValueError, match=r"no nn.Linear layer .* left alone: core: an LSTM, not an"
    ):
        convert(nn.ModuleDict({"core": nn.LSTM(16, 64)}))


def test_a_screen_of_at_most_twelve_lines_that_break_between_words() -> None:
    reasons = [
        LayerReport(
            name=f"blocks.{block}.part{part}.with.a.long.name",
            format="high",
            kernel="Linear",
            parameters=1,
            flops_share=0.0,
            reason=f"reason number {part}",
        )
        for block in range(40)
        for part in range(20)
    ]
    few = convert(TinyGPT()).screen("FP8Precision (bf16-mixed)").splitlines()
    assert few[0].startswith("FP8Precision (bf16-mixed): 8 of 9 linear layers in low precision,")
    assert few[-1] == "  left in high precision: lm_head (output head)"
    many = dataclasses.replace(convert(TinyGPT()), layers=reasons)
    lines = many.screen("FP8Precision (bf16-mixed)").splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) <= 80
    assert "blocks.0-39.part0.with.a.long.name (reason number 0)" in lines[2]
    assert lines[-1].endswith(" more: print(plugin.report)")
