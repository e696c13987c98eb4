"""FP8 without Lightning: convert a model, train it, change a layer's format, convert it back."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_fp import convert, revert


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # before or after: same Parameters

    # Named by a rule, because on FP8 hardware layers of this size are left alone by default.
    report = convert(model, "fp8-delayed", layers={"*": "fp8-delayed"})
    print(report)
    formats = report.precision_map

    for step in range(1, 101):
        x = torch.randn(128, 64, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            output = model(x)
        loss = F.mse_loss(output.float(), x.sin())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        formats.step()  # between steps scales are updated and formats may change
        if step == 50:
            formats.set("2", "bf16", reason="to show that it can")  # in force after the next step
        if step % 25 == 0:
            print(f"step {step:3}: loss {loss.item():.4f}, formats {formats.formats()}")

    model.eval()  # evaluation is in high precision
    print(f"converted back: {revert(model)} layers, first one is {type(model[0]).__name__}")


if __name__ == "__main__":
    main()
