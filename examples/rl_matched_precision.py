"""FP8 in reinforcement learning: rollout in FP8 and training in BF16, with and without importance
weights, against FP8 on both sides, which quantise the same numbers only if told so. The task is
that of fp16_rl_mismatch.py: letters are to be repeated in upper case, each right or wrong.
"""

import argparse
import copy
import math
from dataclasses import dataclass, field

import torch
from fp16_rl_mismatch import (
    TO_UPPER,
    Experts,
    Policy,
    answer_logprobs,
    engine_of,
    pretrained,
    rollout,
    some_prompts,
)
from torch import Tensor

from lightning_fp import convert, revert
from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.rl import SampleOrigin, correction, mismatch_causes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MATCHED = "fp8-block[quantise_like=bf16-export]"


@dataclass(frozen=True)
class Arm:
    rollout: str
    training: str
    correction: str | None = None
    replay: bool = False


ARMS = {
    "bf16, both": Arm("bf16", "bf16"),
    "fp16, both": Arm("fp16", "fp16"),
    "fp8 rollout, bf16 training": Arm("fp8-block", "bf16"),
    "  with truncated weights": Arm("fp8-block", "bf16", correction="verl"),
    "fp8, both": Arm("fp8-block", "fp8-block"),
    "fp8, matched": Arm("fp8-block", MATCHED),
}
MOE_ARMS = {
    "bf16, both": Arm("bf16", "bf16"),
    "bf16, routers replayed": Arm("bf16", "bf16", replay=True),
    "fp8, matched": Arm("fp8-block", MATCHED),
    "fp8, matched, replayed": Arm("fp8-block", MATCHED, replay=True),
}


@dataclass
class Run:
    rewards: list[float] = field(default_factory=list)
    mismatch: dict[str, float] = field(default_factory=dict)
    rerouted: list[float] = field(default_factory=list)

    @property
    def collapsed(self) -> bool:
        """Whether the reward has fallen back to less than half of its best."""
        best = max(sum(self.rewards[i : i + 4]) / 4 for i in range(len(self.rewards) - 3))
        return sum(self.rewards[-4:]) / 4 < best / 2


def engine_in(policy: Policy, format: str) -> Policy:
    """What an engine holds after a weight sync: the bf16 export, cast to FP8 from there."""
    plain = copy.deepcopy(policy)
    revert(plain)
    engine = engine_of(plain, DTYPES.get(format, torch.bfloat16)).eval()
    if format not in DTYPES:
        convert(engine, format, fp8_eval=True)
    for router in routers(engine).values():
        router.replay = None  # the engine chooses
    return engine


def routers(policy: Policy) -> dict[str, Experts]:
    return {name: each for name, each in policy.named_modules() if isinstance(each, Experts)}


def sample(
    engine: Policy, prompts: Tensor, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Bytes, log-probabilities, and the experts that each byte went to, by layer."""
    went: dict[str, list[Tensor]] = {name: [] for name in routers(engine)}
    hooks = [
        each.register_forward_hook(lambda module, *_, name=name: went[name].append(module.chosen))
        for name, each in routers(engine).items()
    ]
    tokens, logprobs = rollout(engine, prompts, length, generator)
    for hook in hooks:
        hook.remove()
    return tokens, logprobs.float(), {name: torch.cat(ids, dim=1) for name, ids in went.items()}


def train(
    arm: Arm,
    variant: str = "dense",
    steps: int = 32,
    batch: int = 32,
    length: int = 6,
    pretraining: int = 60,
    seed: int = 0,
) -> Run:
    policy = pretrained(variant, length, pretraining, seed)
    if arm.training not in DTYPES:
        convert(policy, arm.training)
    dtype = DTYPES.get(arm.training, torch.bfloat16)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=400, enabled=dtype == torch.float16)
    whole, run = TrainingInferenceMismatch(), Run()
    for _ in range(steps):
        engine = engine_in(policy, arm.rollout)
        prompts = some_prompts(batch, length, generator)
        tokens, sampled, theirs = sample(engine, prompts, length, generator)
        right = (tokens[:, -length:] == prompts[:, :-1] + TO_UPPER).float()
        for name, router in routers(policy).items():
            router.replay = theirs[name] if arm.replay else None
        logprobs = answer_logprobs(policy, tokens, length, dtype)

        whole.update(sampled, logprobs)
        run.rewards.append(right.mean().item())
        if theirs:
            ours = {name: router.chosen for name, router in routers(policy).items()}
            origin = SampleOrigin(
                rollout_experts={name: ids[:, -length:] for name, ids in theirs.items()},
                train_experts={name: ids[:, -length:] for name, ids in ours.items()},
            )
            causes = mismatch_causes(sampled, logprobs, None, origin)
            run.rerouted.append(max(causes.rerouted_tokens.values()))

        advantages = right - right.mean()
        if arm.correction is not None:
            advantages = advantages * correction(arm.correction).weights(sampled, logprobs)
        optimizer.zero_grad()
        scaler.scale(-(advantages * logprobs).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    run.mismatch = {name: value.item() for name, value in whole.compute().items()}
    return run


def quantiser_alone(length: int = 6, pretraining: int = 60, seed: int = 0) -> float:
    """k3 between two trainers that differ in the values they cast weights from, in nothing else."""
    policy = pretrained("dense", length, pretraining, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, _ = rollout(policy, some_prompts(64, length, generator), length, generator)
    metric, logprobs = TrainingInferenceMismatch(), []
    for format in ("fp8-block", MATCHED):
        side = copy.deepcopy(policy)
        convert(side, format)
        logprobs.append(answer_logprobs(side, tokens, length, torch.bfloat16))
    metric.update(*logprobs)
    return metric.compute()["k3_kl"].item()


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def report(runs: dict[str, list[Run]]) -> None:
    moe = any(run.rerouted for of in runs.values() for run in of)
    last = "rerouted" if moe else "collapsed"
    print(f"{'':28} {'E|r|':>9} {'k3':>9} {'ESS':>7} {'reward':>7} {'spread':>7} {last:>9}")
    for name, of in runs.items():
        sizes, k3s, ess = (
            mean([run.mismatch[metric] for run in of])
            for metric in ("logprob_abs_diff_mean", "k3_kl", "rollout_is_eff_sample_size")
        )
        ends = [mean(run.rewards[-8:]) for run in of]
        told = f"{mean([mean(run.rerouted) for run in of]):9.2%}"
        if not moe:
            told = f"{sum(run.collapsed for run in of)} of {len(of)}".rjust(9)
        spread = max(ends) - min(ends)
        print(
            f"{name:28} {sizes:9.2e} {k3s:9.2e} {ess:7.4f} {mean(ends):7.3f} {spread:7.3f} {told}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=["dense", "moe"], default="dense")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pretraining", type=int, default=60)
    args = parser.parse_args()

    torch.set_num_threads(1)  # these matrices are too small for more
    arms = MOE_ARMS if args.variant == "moe" else ARMS
    settings = {name: getattr(args, name) for name in ("variant", "steps", "batch", "pretraining")}
    runs = {
        name: [train(arm, **settings, seed=seed) for seed in range(args.seeds)]
        for name, arm in arms.items()
    }
    report(runs)
    if args.variant == "dense":
        apart = quantiser_alone(pretraining=args.pretraining)
        print(f"\nk3 of the quantiser alone, where it casts other values: {apart:.2e}")


if __name__ == "__main__":
    main()
