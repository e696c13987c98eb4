"""Reinforcement learning in BF16 and in FP16: how far is the policy that samples from the one that
is trained? A small transformer learns by policy gradient to repeat letters in upper case. The
rollout engine has the same weights and decodes with a key-value cache; training runs the whole
sequence. Both round, each in its own places, and TrainingInferenceMismatch says how much that is.
"""

import argparse
import copy
import math
import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.stability import MismatchDetector

BYTES = 128
LETTERS = torch.tensor(list(string.ascii_lowercase.encode()))
TO_UPPER = ord("A") - ord("a")


# --- The policy ---------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer, and a trained product of two thin ones beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        self.linear.weight.data += self.up.weight @ self.down.weight
        return self.linear


class Experts(nn.Module):
    """Every token goes to its best expert; the router, in fp32, chooses, unless it is told."""

    chosen: Tensor | None = None
    """Of the last forward, [batch, tokens]."""

    replay: Tensor | None = None
    """To choose in the next ones."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(mlp(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            weights = F.linear(x.float(), self.router.weight.float()).softmax(dim=-1)
        best = weights.argmax(dim=-1) if self.replay is None else self.replay
        self.chosen = best
        outputs = [(best == i).unsqueeze(-1) * expert(x) for i, expert in enumerate(self.experts)]
        return sum(outputs) * weights.gather(-1, best.unsqueeze(-1)).to(x.dtype)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, width, bias=False)
    )


class Block(nn.Module):
    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, cache: list[Tensor] | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            cache[:] = (
                [k, v] if not cache else [torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)]
            )
            scores = (q @ cache[0].mT).float() / math.sqrt(q.shape[-1])
            mixed = scores.softmax(dim=-1).to(q.dtype) @ cache[1]
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.mlp_norm(x))


class Policy(nn.Module):
    def __init__(self, variant: str, length: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            Block(width, 4, Experts(width) if variant == "moe" else mlp(width))
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, start: int = 0, caches: list | None = None) -> Tensor:
        """Logarithms of probabilities of the next byte, fp32."""
        x = self.embedding(tokens) + self.position.weight[start : start + tokens.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index])
        return self.head(self.norm(x)).float().log_softmax(dim=-1)


def add_lora(policy: Policy) -> None:
    policy.requires_grad_(False)
    for block in policy.blocks:
        block.qkv, block.out = LoRA(block.qkv), LoRA(block.out)
        block.feed_forward[0] = LoRA(block.feed_forward[0])
        block.feed_forward[2] = LoRA(block.feed_forward[2])


# --- Rollout and training -----------------------------------------------------------------------


def engine_of(policy: Policy, dtype: torch.dtype) -> Policy:
    """What a rollout engine holds: the weights in its dtype, adapters merged."""
    engine = copy.deepcopy(policy).requires_grad_(False)
    for module in list(engine.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRA):
                setattr(module, name, child.merged())
    engine.to(dtype)
    for module in engine.modules():
        if isinstance(module, Experts):
            module.router.float()
    return engine


@torch.no_grad()
def rollout(
    engine: Policy, prompts: Tensor, answer: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Samples byte by byte; [batch, prompt + answer] bytes, [batch, answer] log-probabilities."""
    tokens, logprobs = prompts, []
    caches: list[list[Tensor]] = [[] for _ in engine.blocks]
    for place in range(prompts.shape[1] + answer - 1):
        scores = engine(tokens[:, place : place + 1], place, caches)[:, 0]
        if place >= prompts.shape[1] - 1:
            sampled = torch.multinomial(scores.exp(), 1, generator=generator)
            tokens = torch.cat([tokens, sampled], dim=1)
            logprobs.append(scores.gather(1, sampled))
    return tokens, torch.cat(logprobs, dim=1)


@torch.no_grad()
def decode(engine: Policy, tokens: Tensor) -> Tensor:
    """What a rollout computes for given bytes, one after the other; [batch, tokens, BYTES]."""
    caches: list[list[Tensor]] = [[] for _ in engine.blocks]
    places = range(tokens.shape[1])
    return torch.cat([engine(tokens[:, i : i + 1], i, caches) for i in places], dim=1)


def answer_logprobs(policy: Policy, tokens: Tensor, answer: int, dtype: torch.dtype) -> Tensor:
    """[batch, answer], by one forward over the whole sequence under autocast."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        scores = policy(tokens[:, :-1])
    return scores.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)[:, -answer:]


def some_prompts(batch: int, length: int, generator: torch.Generator) -> Tensor:
    letters = LETTERS[torch.randint(len(LETTERS), (batch, length), generator=generator)]
    return torch.cat([letters, torch.full((batch, 1), ord("="))], dim=1)


def pretrained(variant: str, length: int, steps: int, seed: int) -> Policy:
    """A policy that has seen the task, in fp32, and is not yet good at it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(variant, 2 * length + 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        prompts = some_prompts(128, length, generator)
        tokens = torch.cat([prompts, prompts[:, :-1] + TO_UPPER], dim=1)
        optimizer.zero_grad()
        (-answer_logprobs(policy, tokens, length, torch.float32).mean()).backward()
        optimizer.step()
    if variant == "lora":
        add_lora(policy)
    return policy


def probe() -> tuple[Policy, Tensor, Callable[[Policy, Tensor], Tensor]]:
    """For `lightning-fp mismatch examples/fp16_rl_mismatch.py:probe`: a policy, bytes, and how a
    rollout evaluates them."""
    policy, length = pretrained("dense", length=6, steps=60, seed=0), 6
    generator = torch.Generator().manual_seed(1)
    prompts = some_prompts(32, length, generator)
    tokens, _ = rollout(policy, prompts, length, generator)
    return policy, tokens, decode


@dataclass
class Run:
    rewards: list[float]
    steps: list[dict[str, float]]
    """Mismatch at each step."""

    whole: dict[str, float]
    """Over all steps in which engine and trainer had the same weights."""

    warned: int | None
    """The step at which the early warning came."""

    warning: str = "no early warning"
    """What it said."""


def train(
    dtype: torch.dtype,
    variant: str = "dense",
    steps: int = 48,
    batch: int = 32,
    length: int = 6,
    pretraining: int = 60,
    seed: int = 0,
    last_sync: int | None = None,
) -> Run:
    """Policy gradient; with `last_sync` the engine gets no new weights after that step."""
    policy = pretrained(variant, length, pretraining, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    lr = 2e-2 if variant == "lora" else 3e-3
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    # A growth interval of 400 is that of the paper's setting, arXiv 2510.26788.
    scaler = torch.amp.GradScaler("cpu", growth_interval=400, enabled=dtype == torch.float16)
    whole, detector = TrainingInferenceMismatch(), MismatchDetector(armed=16)
    watched = detector.init()
    run = Run([], [], {}, None)
    for step in range(1, steps + 1):
        if last_sync is None or step <= last_sync:
            engine = engine_of(policy, dtype)
        prompts = some_prompts(batch, length, generator)
        tokens, sampled = rollout(engine, prompts, length, generator)
        right = (tokens[:, -length:] == prompts[:, :-1] + TO_UPPER).float()
        logprobs = answer_logprobs(policy, tokens, length, dtype)

        metric = TrainingInferenceMismatch()
        metric.update(sampled, logprobs)
        run.steps.append({name: value.item() for name, value in metric.compute().items()})
        run.rewards.append(right.mean().item())
        if last_sync is None or step <= last_sync:
            whole.update(sampled, logprobs)
        watched, warning = detector.step(
            watched, abs_diff=run.steps[-1]["logprob_abs_diff_mean"], k3=run.steps[-1]["k3_kl"]
        )
        if warning.began and run.warned is None:
            run.warned, run.warning = step, warning.reason

        optimizer.zero_grad()
        loss = -((right - right.mean()) * logprobs).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    run.whole = {name: value.item() for name, value in whole.compute().items()}
    return run


# --- What it shows ------------------------------------------------------------------------------


def report(runs: dict[str, Run]) -> None:
    print(f"{'':4} " + " ".join(f"{name:^32}" for name in runs))
    print("step " + " ".join(f"{'reward':>8} {'E|r|':>11} {'k3':>11}" for _ in runs))
    for index in range(len(next(iter(runs.values())).steps)):
        cells = []
        for run in runs.values():
            size, k3 = (run.steps[index][name] for name in ("logprob_abs_diff_mean", "k3_kl"))
            mark = "!" if run.warned == index + 1 else " "
            cells.append(f"{run.rewards[index]:8.2f} {size:11.2e} {k3:10.2e}{mark}")
        print(f"{index + 1:4} " + " ".join(cells))


def verdict(name: str, ratio: float, low: float, high: float, why: str) -> None:
    holds = "as expected" if low <= ratio <= high else "NOT as expected"
    print(f"{name} in BF16 over FP16: {ratio:.1f} ({why}): {holds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=["dense", "lora", "moe"], default="dense")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # these matrices are too small for more
    settings = {name: getattr(args, name) for name in ("variant", "steps", "batch", "seed")}
    last_sync = args.steps // 2
    runs = {
        "bf16": train(torch.bfloat16, **settings),
        "fp16": train(torch.float16, **settings),
        f"bf16, no sync after step {last_sync}": train(
            torch.bfloat16, last_sync=last_sync, **settings
        ),
    }
    report(runs)

    bf16, fp16, stale = runs.values()
    ratios = {
        name: bf16.whole[name] / fp16.whole[name] for name in ("logprob_abs_diff_mean", "k3_kl")
    }
    print()
    if args.variant == "moe":
        print(
            "Rounding can send a token to another expert on one side; then r is large, and k3 more."
        )
    verdict("E|r|", ratios["logprob_abs_diff_mean"], 5, 12, "three more bits of mantissa: 8")
    verdict("k3", ratios["k3_kl"], 30, math.inf, "the square of it: 64")
    print(f"early warning: bf16 {bf16.warned}, fp16 {fp16.warned}, not synced {stale.warned}")
    if stale.warned:
        print(f"  {stale.warned - last_sync} steps after the last sync: {stale.warning}")


if __name__ == "__main__":
    main()
