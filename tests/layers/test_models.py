"""Models nobody here wrote: convert, train two steps, revert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp import ConversionReport, convert, revert
from lightning_fp.layers import FPLinear

FORMATS = ["fp8-dynamic", "fp8-rowwise"]


def train_two_steps(
    model: nn.Module, loss: Callable[[], Tensor], format: str = "fp8-dynamic", **options: Any
) -> ConversionReport:
    """Convert, take two optimizer steps, revert; what must hold for every model."""
    keys, parameters = list(model.state_dict()), list(model.parameters())
    types = {name: type(module) for name, module in model.named_modules()}
    report = convert(model, format, **options)
    assert report.converted
    assert list(model.state_dict()) == keys
    model.train()
    trained = [p for p in parameters if p.requires_grad]
    frozen = [(p, p.detach().clone()) for p in parameters if not p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss()
        value.backward()
        for layer in report.converted:
            weight = model.get_submodule(layer.name).weight
            if weight.requires_grad and weight.grad is not None:
                assert weight.grad.isfinite().all(), layer.name
        optimizer.step()
        losses.append(value.item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[0] != losses[1]
    assert all(torch.equal(p, copy) for p, copy in frozen)
    assert list(model.state_dict()) == keys
    reloaded = {key: value.clone() for key, value in model.state_dict().items()}
    assert revert(model) == list(types.values()).count(nn.Linear)
    assert {name: type(module) for name, module in model.named_modules()} == types
    model.load_state_dict(reloaded, strict=True)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return report


def reasons(report: ConversionReport) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in report.layers}


@pytest.mark.compatibility(
    "layers",
    "nn.MultiheadAttention, nn.Transformer",
    "works with a note",
    "attention's own projections stay in high precision",
)
@pytest.mark.parametrize("format", FORMATS)
def test_lightnings_demo_transformer(format: str) -> None:
    from lightning.pytorch.demos import Transformer

    model = Transformer(vocab_size=64, ninp=32, nhead=2, nhid=64, nlayers=2)
    tokens = torch.randint(0, 64, (2, 17))

    def loss() -> Tensor:
        output = model(tokens[:, :-1], tokens[:, 1:])
        return F.nll_loss(output.float(), tokens[:, 1:].reshape(-1))

    report = train_two_steps(model, loss, format)
    why = reasons(report)
    attention = next(name for name in why if name.endswith("self_attn"))
    assert why[attention] == "nn.MultiheadAttention multiplies with its weights directly"
    assert "NonDynamicallyQuantizableLinear, a subclass of nn.Linear" in str(
        why[f"{attention}.out_proj"]
    )
    assert why["decoder"] == "output head"
    assert {name.rsplit(".", 1)[-1] for name, r in why.items() if r is None} == {
        "linear1",
        "linear2",
    }
    both = attention.replace("layers.0.", "layers.0-1.")  # repeated blocks are named once
    assert f"left in high precision: {both}" in report.summary()


@pytest.mark.parametrize("format", FORMATS)
def test_llama(format: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 128, (2, 16))
    report = train_two_steps(model, lambda: model(input_ids=tokens, labels=tokens).loss, format)
    # gate_proj is a part of the MLP, no router
    assert len(report.converted) == 2 * 7
    assert {name: r for name, r in reasons(report).items() if r} == {"lm_head": "output head"}


@pytest.mark.compatibility("layers", "tied weights, activation checkpointing", "works")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_llama_with_tied_embeddings_and_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    # the old name warns from transformers 5 on
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    tokens = torch.randint(0, 128, (2, 16))
    report = train_two_steps(
        model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert reasons(report)["lm_head"] == "output head: shares its weight with the embedding"


@pytest.mark.parametrize("format", FORMATS)
def test_bert(format: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    tokens, labels = torch.randint(0, 128, (3, 11)), torch.tensor([0, 1, 2])
    report = train_two_steps(model, lambda: model(input_ids=tokens, labels=labels).loss, format)
    why = reasons(report)
    assert why["classifier"] == "output head"
    # "output" in the middle of a name is a layer like any other
    assert why["bert.encoder.layer.0.attention.output.dense"] is None
    assert why["bert.encoder.layer.1.output.dense"] is None


@pytest.mark.parametrize("format", FORMATS)
def test_vit(format: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    model = transformers.ViTForImageClassification(config)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    report = train_two_steps(
        model,
        lambda: model(pixel_values=images, labels=labels).loss,
        format,
        example_input={"pixel_values": images},
    )
    assert report.measured
    (conv,) = [layer for layer in report.layers if layer.format == "not linear"]
    assert conv.reason == "Conv2d: only linear layers are converted"
    assert 0 < conv.flops_share < 0.5
    assert 0.5 < report.flops_share < 1


@pytest.mark.compatibility(
    "layers", "convolutions", "works with a note", "left in high precision, named"
)
@pytest.mark.parametrize("format", FORMATS)
def test_convnet(format: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
    report = train_two_steps(
        model, lambda: F.cross_entropy(model(images).float(), labels), format, example_input=images
    )
    why = reasons(report)
    assert why["0"] == "Conv2d: only linear layers are converted"
    assert why["5"] is None
    assert why["7"] == "out_features=10 is not a multiple of 16"


class Experts(nn.Module):
    """Top-1 routing: some expert may see no token at all."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 16, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            mixed[mine] = (expert(x[mine]) * weights[mine].unsqueeze(-1)).to(mixed.dtype)
        return self.out(mixed)


@pytest.mark.compatibility("layers", "mixture of experts of linear layers", "works")
@pytest.mark.parametrize("format", FORMATS)
def test_mixture_of_experts(format: str) -> None:
    model, x = Experts(), torch.randn(12, 32)  # fewer tokens than experts
    report = train_two_steps(model, lambda: model(x).square().mean(), format)
    assert reasons(report)["router"] == "router or gate"
    assert len(report.converted) == 17


@pytest.mark.compatibility("wrappers", "peft LoRA", "works")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_lora(format: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    base = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    tokens = torch.randint(0, 128, (2, 16))
    report = train_two_steps(model, lambda: model(input_ids=tokens, labels=tokens).loss, format)
    why = reasons(report)
    assert {reason for name, reason in why.items() if ".lora_" in name} == {"adapter"}
    assert [name for name, r in why.items() if name.endswith("q_proj.base_layer")]
    assert all(r is None for name, r in why.items() if name.endswith("base_layer"))


def test_frozen_weights_get_no_gradient_and_keep_no_input() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].requires_grad_(False)
    convert(model)
    model(torch.randn(8, 32)).square().sum().backward()
    assert model[0].weight.grad is not None
    assert model[1].weight.grad is None
    assert isinstance(model[1], FPLinear)
