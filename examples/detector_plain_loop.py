"""The divergence detector in a plain PyTorch loop: skip, look, go back."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lightning_fp import DivergenceDetector

STEPS, FAULT = 400, 250
EVERY, KEPT = 20, 8  # snapshots: how often, and how many, so that one is older than any anomaly


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 16, generator=generator)
    y = x.sin() + 0.1 * torch.randn(64, 16, generator=generator)
    return x, (y * float("nan") if step == 100 else y)  # one batch is broken


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    detector = DivergenceDetector()
    state = detector.init()
    snapshots: list[tuple[int, dict, dict]] = []
    clamp = False  # the fault: from some step on the output is clamped, as by a stuck scale

    for step in range(STEPS):
        clamp = clamp or step == FAULT
        x, y = batch(step)
        output = model(x)
        loss = F.mse_loss(output.clamp(-0.5, 0.5) if clamp else output, y)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # returns the norm before clipping
        lr = optimizer.param_groups[0]["lr"]

        state, decision = detector.step(state, loss=loss.item(), grad_norm=norm.item(), lr=lr)
        if decision.kind != "ok":
            print(f"step {step}: {decision.kind}: {decision.reason}")
        if decision.kind == "suspect":
            clamp = False  # look for the cause; here it is known, and goes back to before the onset
            began, weights, moments = next(
                s for s in reversed(snapshots) if s[0] <= step - decision.onset
            )
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            state = detector.rolled_back(state)
            print(f"step {step}: back to the weights of step {began}")
            continue
        if not decision.skip:
            optimizer.step()
        if step % EVERY == 0 and decision.kind == "ok":
            weights, moments = model.state_dict(), optimizer.state_dict()
            snapshots = [*snapshots, (step + 1, *copy.deepcopy((weights, moments)))][-KEPT:]

    checkpoint = detector.state_dict(state)  # plain numbers: goes into any checkpoint
    print(f"last step: {decision.kind}, loss {loss.item():.4f}, usual {decision.baseline:.4f}")
    print("continues from a checkpoint:", detector.load_state_dict(checkpoint) == state)


if __name__ == "__main__":
    main()
