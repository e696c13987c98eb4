"""Forward and backward of an MLP: our kernels, torchao's emulation, plain nn.Linear.

On a CPU every FP8 product is emulated in a wider GEMM. `gemm_floor` is the time of those products
alone, without any cast: no emulation can be faster than it.
"""

from __future__ import annotations

import torch
from side_by_side import medians, report
from torch import nn

from lightning_fp import convert
from lightning_fp.kernels.torchao import import_float8

TOKENS, WIDTH, HIDDEN = 1024, 512, 2048


def mlp() -> nn.Sequential:
    """512 -> 2048 -> 512 in bf16."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=False), nn.GELU(), nn.Linear(HIDDEN, WIDTH, bias=False)
    ).bfloat16()


def torchao_mlp() -> nn.Module:
    """The same, converted by torchao, emulated."""
    float8 = import_float8()
    config = float8.Float8LinearConfig(emulate=True)
    return float8.convert_to_float8_training(mlp(), config=config)


def converted_mlp(format: str) -> tuple[nn.Module, object]:
    """The same, converted by us, with its precision map."""
    model = mlp()
    return model, convert(model, format).precision_map


def forward_backward(model: nn.Module, x: torch.Tensor, table: object = None):
    def run() -> None:
        output = model(x)
        output.backward(torch.ones_like(output))
        if table is not None:
            table.step()

    return run


def saved_bytes(model: nn.Module, tokens: int = 4096) -> int:
    """Bytes kept for backward by two chained linears, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model[2](model[0](x))
    del output
    return sum(kept.values())


def main() -> None:
    torch._dynamo.config.recompile_limit = 64
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    wide = mlp().float()
    floor_x = x.detach().float().requires_grad_()
    claims = []
    for mode in ("eager", "compiled"):
        dynamic, _ = converted_mlp("fp8-dynamic")
        delayed, table = converted_mlp("fp8-delayed")
        models = {
            "bf16": mlp(),
            "torchao": torchao_mlp(),
            "dynamic": dynamic,
            "delayed": delayed,
            "gemm_floor": wide,
        }
        if mode == "compiled":
            torch._dynamo.reset()
            models = {name: torch.compile(model) for name, model in models.items()}
        runs = {
            name: forward_backward(
                model,
                floor_x if name == "gemm_floor" else x,
                table if name == "delayed" else None,
            )
            for name, model in models.items()
        }
        time = medians(runs)
        claims.append(
            (f"dynamic / torchao emulate, {mode}", time["dynamic"] / time["torchao"], "<=", 0.42)
        )
        claims.append(
            (
                f"  float32 GEMMs alone / torchao emulate, {mode}",
                time["gemm_floor"] / time["torchao"],
                "<=",
                0.42,
            )
        )
        if mode == "compiled":
            claims.append(
                ("dynamic / bf16 nn.Linear, compiled", time["dynamic"] / time["bf16"], "<=", 1.7)
            )
        claims.append((f"delayed / dynamic, {mode}", time["delayed"] / time["dynamic"], "<=", 0.95))
    ours, _ = converted_mlp("fp8-dynamic")
    claims.append(
        ("bytes for backward / torchao", saved_bytes(ours) / saved_bytes(torchao_mlp()), "<=", 0.55)
    )
    report(claims)


if __name__ == "__main__":
    main()
