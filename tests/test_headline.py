"""The headline of README on models as people bring them: FP8, or one line that says why not."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback, StagedRollout
from lightning_fp.records import read_statistics, read_steps
from tests.helper import LanguageModel, make_trainer, text_loader

STEPS = 6


class Task(L.LightningModule):
    """Anything that maps x to something; it is to become zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return self.net(x).float().square().mean()

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


class Heads(nn.Module):
    """Layers with names of their own, and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


class ConvNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.fc = nn.Linear(8 * 6 * 6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class GAN(Task):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.critic = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def training_step(self, x: Tensor, index: int) -> None:
        generators, critics = self.optimizers()
        fake = self.generator(torch.randn(len(x), 16))
        critics.zero_grad()
        self.manual_backward(
            self.critic(x).float().mean() - self.critic(fake.detach()).float().mean()
        )
        critics.step()
        generators.zero_grad()
        self.manual_backward(self.critic(fake).float().mean())
        generators.step()

    def configure_optimizers(self) -> Any:
        nets = (self.generator, self.critic)
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]


def rows(*shape: int, count: int = 64) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randn(count, *shape, generator=generator), batch_size=8)


def train(
    module: L.LightningModule, data: Any, directory: Path, **options: Any
) -> tuple[FP8Precision, set[str]]:
    """Train as README does; the layers that had statistics, so that they were in FP8."""
    plugin = FP8Precision(**options)
    monitor = ClampMonitor(every_n_steps=1, dirpath=directory)
    trainer = make_trainer(
        plugin,
        max_steps=STEPS,
        log_every_n_steps=2,
        callbacks=[monitor, PrecisionFallback(), StagedRollout()],
    )
    trainer.fit(module, data)
    return plugin, set(read_statistics(directory)["layer"].to_pylist())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_two_blocks(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    _, low = train(LanguageModel(), text_loader(100), tmp_path)
    assert low == {
        *("model.blocks.0.fc1", "model.blocks.0.fc2", "model.blocks.1.qkv", "model.blocks.1.proj")
    }
    assert "the model has 2 numbered blocks, fewer than 4; instead it takes thirds" in said.text
    assert "never on" not in said.text


def test_layers_without_blocks(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    _, low = train(Task(Heads()), rows(32), tmp_path)
    assert low == {"net.fc2"}
    assert "as the model defines them: first net.fc1; middle net.fc2; last net.out" in said.text


def test_thirds_follow_the_order_in_which_layers_run(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    class Turned(Heads):
        """Defined from the end: out, fc2, fc1."""

        def __init__(self) -> None:
            super().__init__()
            parts = {name: self._modules.pop(name) for name in ("out", "fc1", "fc2")}
            self._modules.update(parts)

    module = Task(Turned())
    module.forward = lambda x: module.net(x)
    module.example_input_array = torch.zeros(1, 32)
    _, low = train(module, rows(32), tmp_path)
    assert low == {"net.fc2"}
    assert "as they run: first net.fc1; middle net.fc2; last net.out" in said.text


def test_a_convolutional_net_with_one_linear_layer(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    _, low = train(Task(ConvNet(16)), rows(1, 8, 8), tmp_path)
    assert low == {"net.fc"}
    assert "stage 'all-but-ends' is skipped: it changes nothing on this model" in said.text


def test_where_nothing_can_be_in_fp8_one_line_says_why_and_what_to_do(tmp_path: Path) -> None:
    why = "nothing to convert: every linear layer was left in high precision (net.fc: out_features"
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        train(Task(ConvNet(10)), rows(1, 8, 8), tmp_path)
    assert "name the layers to convert with layers={pattern: format}" in str(error.value)
    assert "net.conv: Conv2d: only linear layers are converted" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_any_linear_layer_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to convert: the model has no") as error:
        train(Task(nn.Conv2d(1, 8, 3)), rows(1, 8, 8), tmp_path)
    assert str(error.value).endswith("without this plugin, e.g. with precision='bf16-mixed'")


def test_a_gan(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    _, low = train(GAN(), rows(32), tmp_path)
    assert low == {"generator.2", "critic.0"}
    steps = read_steps(tmp_path)
    assert len(steps) == STEPS // 2  # a batch steps twice
    assert min(steps["seconds"].to_pylist()) > 0
    assert None not in steps["loss"].to_pylist()


def llama(layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


class CausalLM(Task):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss


def test_a_hugging_face_llama(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    _, low = train(CausalLM(llama(4)), text_loader(100), tmp_path)
    assert {name.split(".layers.")[1][0] for name in low} == {"1", "2"}
    assert len(low) == 2 * 7
    assert "numbered blocks" not in said.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(4), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    plugin, low = train(CausalLM(model), text_loader(100), tmp_path)
    assert len(low) == 2 * 7
    assert not any("lora_" in name for name in low)
    alone = {row.name: row.reason for row in plugin.report.layers if row.reason}
    assert any(reason == "adapter" for reason in alone.values())
