"""What is measured of a step is what it says, in any loop, and changes nothing."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.loop import PrecisionLoop
from lightning_fp.numerics.sharpness import kurtosis, logit_sharpness
from lightning_fp.records import read_events, read_stability
from lightning_fp.records.stability import SIGNALS as COLUMNS
from lightning_fp.telemetry.stability.attention_logits import AttentionLogits, attention_logit_max
from lightning_fp.telemetry.stability.forward_signals import ForwardSignals, sharpness_by_gradient
from lightning_fp.telemetry.stability.signals import NAMES, PUBLISHED
from lightning_fp.telemetry.stability.step_values import StepValues
from lightning_fp.telemetry.stability.update_signals import UpdateSignals
from tests.helper import TinyGPT, next_byte_loss, text_rows

CPU = torch.device("cpu")


def signal(values: StepValues, name: str) -> float:
    return values.take(CPU)[NAMES.index(name)].item()


def test_the_table_has_what_is_measured() -> None:
    assert NAMES == COLUMNS


# ------------------------------------------------------------------ the forward


def logits_and_targets() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 10, 50, requires_grad=True), torch.randint(50, (6, 10))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_targets_are_read_off_the_gradient(scale: float) -> None:
    logits, targets = logits_and_targets()
    targets[:, 7:] = -100
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (gradient,) = torch.autograd.grad(scale * loss, logits)
    seen = targets.flatten() >= 0
    expected = logit_sharpness(logits.flatten(0, 1)[seen], targets.flatten()[seen]).mean()
    found = sharpness_by_gradient(logits.detach().flatten(0, 1), gradient.flatten(0, 1))
    torch.testing.assert_close(found, expected.detach())


def test_label_smoothing_has_targets_and_a_regression_none() -> None:
    logits, targets = logits_and_targets()
    rows = logits.flatten(0, 1)
    smooth = F.cross_entropy(rows, targets.flatten(), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(smooth, rows)
    expected = logit_sharpness(rows, targets.flatten()).mean().detach()
    torch.testing.assert_close(sharpness_by_gradient(rows.detach(), gradient), expected)
    (gradient,) = torch.autograd.grad((rows - 3).square().mean(), rows)
    assert sharpness_by_gradient(rows.detach(), gradient).isnan()


def test_a_forward_and_its_backward() -> None:
    model, values = TinyGPT(), StepValues()
    watching = ForwardSignals(model, None, values, lambda: True)
    assert watching.head == "lm_head"
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.lm_head.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
    batch = text_rows(4)
    next_byte_loss(model, batch).backward()
    row = dict(zip(NAMES, values.take(CPU).tolist(), strict=True))
    assert row["output_logit_max"] <= outputs[0].abs().max().item()
    assert row["activation_kurtosis"] > 0
    assert row["logit_sharpness"] > 0
    few = len(outputs[0].flatten(0, 1)) <= 64
    if few:
        assert row["activation_kurtosis"] == pytest.approx(max(kurtosis(x).item() for x in inputs))
        expected = logit_sharpness(outputs[0].flatten(0, 1), batch[:, 1:].flatten()).mean()
        assert row["logit_sharpness"] == pytest.approx(expected.item(), rel=1e-4)
    model.eval()
    model(batch[:, :-1])
    assert all(math.isnan(value) for value in values.take(CPU).tolist())
    watching.close()
    model.train()
    next_byte_loss(model, batch).backward()
    assert all(math.isnan(value) for value in values.take(CPU).tolist())


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head must be the name of a module, got 'head'"):
        ForwardSignals(TinyGPT(), "head", StepValues(), lambda: True)


# ------------------------------------------------------------------ attention


def all_logits(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> float:
    size = (q @ k.transpose(-1, -2) * scale).abs()
    return (size if hidden is None else size.masked_fill(hidden, 0)).max().item()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_largest_logit_of_attention(is_causal: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 4, 12, 8)
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1) if is_causal else None
    expected = all_logits(q, k, hidden, 8**-0.5 if scale is None else scale)
    found = attention_logit_max(q, k, None, is_causal, scale).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_masks_shared_heads_and_queries_left_out() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 100, 8), torch.randn(2, 2, 100, 8)
    looks = torch.rand(2, 1, 1, 100) < 0.5
    wide = k.repeat_interleave(2, dim=1)
    expected = all_logits(q, wide, ~looks, 8**-0.5)
    found = attention_logit_max(q, k, looks).item()
    assert 0.5 * expected < found <= expected * (1 + 1e-5)
    added = torch.where(looks, 0.0, -torch.inf)
    assert attention_logit_max(q, k, added).item() == found
    assert attention_logit_max(q, k, torch.zeros(100, 100, dtype=torch.bool)).isnan()


def test_the_mode_sees_every_call_and_changes_none() -> None:
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    plain = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    seen: list[Tensor] = []
    with AttentionLogits(seen.append):
        watched = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        q + q
    assert torch.equal(plain, watched)
    assert len(seen) == 1
    assert not seen[0].requires_grad


# ------------------------------------------------------------------ updates


def test_the_update_in_units_of_the_rate() -> None:
    weight = nn.Parameter(torch.randn(50, 100))
    values = StepValues()
    sgd = torch.optim.SGD([weight], lr=0.5)
    UpdateSignals([sgd], values, lambda: True)
    weight.grad = torch.randn(50, 100)
    rms = weight.grad[0, ::2].numel()  # every second element is looked at
    assert rms == 50
    sgd.step()
    expected = weight.grad.flatten()[::2].square().mean().sqrt().item()
    assert signal(values, "update_rms") == pytest.approx(expected, rel=1e-4)


def test_gradient_noise_of_known_gradients() -> None:
    torch.manual_seed(0)
    signal_part = torch.randn(1000)
    found = {}
    for noise in (0.0, 1.0, 30.0):
        weight, values = nn.Parameter(torch.zeros(1000)), StepValues()
        optimizer = torch.optim.SGD([weight], lr=0.1)
        UpdateSignals([optimizer], values, lambda: True)
        for _ in range(60):
            weight.grad = signal_part + noise * torch.randn(1000)
            optimizer.step()
            last = signal(values, "gradient_noise")
        found[noise] = last
    assert found[0.0] == pytest.approx(0, abs=1e-5)
    assert found[1.0] == pytest.approx(0.5, abs=0.1)  # half of the power turns
    assert found[30.0] > 0.85


def test_closures_and_replays() -> None:
    weight, values = nn.Parameter(torch.ones(4)), StepValues()
    optimizer, runs = torch.optim.Adam([weight], lr=0.1), [True]
    watching = UpdateSignals([optimizer], values, lambda: runs[0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert signal(values, "update_rms") == pytest.approx(1.0, rel=1e-3)  # Adam's first step
    runs[0] = False
    optimizer.step(closure)
    assert math.isnan(signal(values, "update_rms"))
    runs[0] = True
    watching.close()
    optimizer.step(closure)
    assert math.isnan(signal(values, "update_rms"))


# ------------------------------------------------------------------ a loop of one's own


def trained(dirpath: Path | None, steps: int = 24, **options: Any) -> tuple[PrecisionLoop, Any]:
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shown: list[tuple[dict[str, float], int]] = []
    with PrecisionLoop(
        model,
        optimizer,
        "dynamic",
        dirpath=dirpath,
        log_every_n_steps=10,
        logger=lambda values, step: shown.append((values, step)),
        **options,
    ) as loop:
        for step in range(steps):
            loop.step(
                lambda batch: next_byte_loss(model, batch), text_rows()[4 * step : 4 * step + 4]
            )
    return loop, shown


def test_every_step_is_in_the_table_and_on_the_board(tmp_path: Path) -> None:
    _, shown = trained(tmp_path, stability=True)
    table = read_stability(tmp_path).to_pydict()
    assert table["step"] == list(range(1, 25))
    for name in ("loss", "grad_norm", "lr", *NAMES):
        missing = [value is None for value in table[name]]
        # The first gradient has none to be compared with.
        assert sum(missing) == (name == "gradient_noise"), name
    stability = [(values, step) for values, step in shown if PUBLISHED[0] in values]
    assert [step for _, step in stability] == list(range(1, 25))
    assert all(set(values) == set(PUBLISHED) for values, _ in stability)
    assert [values["stability/update_rms"] for values, _ in stability] == pytest.approx(
        table["update_rms"]
    )
    (event,) = read_events(tmp_path, kinds=["rehearsal"])
    assert event.outcome == "passed"  # pyright: ignore


def test_the_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    without, _ = trained(None)
    with_it, _ = trained(tmp_path, stability=True)
    for one, other in zip(without.model.parameters(), with_it.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_read_from_the_device_within_an_interval(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU nobody notices; so whoever asks for a number is counted."""
    asked = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        method = getattr(Tensor, name)

        def counting(self: Tensor, *args: Any, method: Any = method, name: str = name) -> Any:
            # Under a mode a method comes by a second time, from within itself.
            stack = traceback.extract_stack(limit=4)
            if not any(frame.name == "counting" for frame in stack[:-1]):
                asked.append(str(stack[-2]))
            return method(self, *args)

        monkeypatch.setattr(Tensor, name, counting)
    counts = []
    for stability in (False, True):
        asked.clear()
        trained(None, 9, stability=stability, fallback=False, monitor=False)
        counts.append(Counter(asked))
    more = counts[1] - counts[0]
    assert sum(more.values()) <= 1, more  # the end of the run tells what is left


def test_a_failure_ends_the_log_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: StepValues, device: torch.device) -> Tensor:
        raise RuntimeError("full")

    monkeypatch.setattr(StepValues, "take", broken)
    loop, _ = trained(tmp_path, stability=True)
    assert loop.global_step == 24
    assert caplog.text.count("failed; training continues") == 1


@pytest.mark.slow
def test_compiled_models_have_what_the_optimizer_knows(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    with PrecisionLoop(
        model, optimizer, dirpath=tmp_path, stability=True, fallback=False, monitor=False
    ) as loop:
        for _ in range(3):
            loop.step(lambda batch: next_byte_loss(compiled, batch), text_rows(4))
    table = read_stability(tmp_path).to_pydict()
    assert table["activation_kurtosis"] == [None] * 3
    assert None not in table["update_rms"]
