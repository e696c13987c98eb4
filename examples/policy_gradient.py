"""Policy gradients in a loop of one's own: old log-probabilities in the formats of training, and
the mismatch between rollout engine and trainer as an early warning that acts.

The task is that of fp16_rl_mismatch.py; the engine samples in bf16. Training begins in bf16 too,
and a recipe takes it to FP8, which rounds where the engine does not: the mismatch grows tenfold,
and the early warning brings the layers back.
"""

import argparse
from pathlib import Path

import torch
from fp16_rl_mismatch import TO_UPPER, Policy, pretrained, rollout, some_prompts
from torch import Tensor

from lightning_fp.loop import PrecisionLoop
from lightning_fp.recipes import RolloutRecipe, Stage
from lightning_fp.records import read_events
from lightning_fp.stability import MismatchDetector

LENGTH = 6
CLIP = 0.2


def logprobs_of(policy: Policy, tokens: Tensor) -> Tensor:
    """Of the answer's bytes; [batch, LENGTH]."""
    scores = policy(tokens[:, :-1])
    return scores.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)[:, -LENGTH:]


def engine_of(policy: Policy) -> Policy:
    """What a rollout engine holds: the weights in bf16."""
    engine = Policy("dense", 2 * LENGTH + 1)
    engine.load_state_dict(policy.state_dict())
    return engine.to(torch.bfloat16).requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--high-until", type=int, default=36, help="steps in bf16 before FP8")
    parser.add_argument("--output", type=Path, default=Path("runs/policy_gradient"))
    options = parser.parse_args()

    torch.set_num_threads(1)  # these matrices are too small for more
    policy = pretrained("dense", LENGTH, steps=60, seed=0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    recipe = RolloutRecipe(
        name="fp8-later",
        stages=(
            Stage(name="bf16", layers={"*": "high"}, until={"steps": options.high_until}),
            Stage(name="fp8", layers={"*": "configured"}),
        ),
    )
    loop = PrecisionLoop(
        policy,
        optimizer,
        "dynamic",
        layers={"head": "bf16", "*": "fp8-dynamic"},
        clip_norm=1.0,
        recipe=recipe,
        mismatch={"act": "raise-precision", "detector": MismatchDetector(armed=16)},
        dirpath=options.output,
    )
    generator, exact = torch.Generator().manual_seed(1), list[bool]()

    def compute_loss(batch: tuple[Tensor, ...]) -> Tensor:
        tokens, sampled, old, advantages, first = batch
        logprobs = logprobs_of(policy, tokens)
        if first:  # later the weights are others than the engine's
            loop.mismatch.update(sampled, logprobs.detach())
        ratios = (logprobs - old).exp()
        clipped = ratios.clamp(1 - CLIP, 1 + CLIP)
        return -torch.minimum(ratios * advantages, clipped * advantages).mean()

    while loop.global_step < options.steps:
        prompts = some_prompts(options.batch, LENGTH, generator)
        tokens, sampled = rollout(engine_of(policy), prompts, LENGTH, generator)
        right = (tokens[:, -LENGTH:] == prompts[:, :-1] + TO_UPPER).float()
        with loop.as_trained(), torch.no_grad():  # not in eval(), which would be in bf16
            old = logprobs_of(policy, tokens)
        advantages = right - right.mean()
        for first in (True, False):
            loss = loop.step(compute_loss, (tokens, sampled, old, advantages, first))
            if first:  # with ratios of 1 nothing but the advantages is left
                exact.append(loss.item() == -advantages.mean().item())
        if loop.global_step % 6 == 0 and loop.mismatch.latest is not None:
            size = loop.mismatch.latest["logprob_abs_diff_mean"]
            formats = sorted(set(loop.precision_map.formats().values()))
            step, reward = loop.global_step, right.mean()
            print(f"step {step:3}: reward {reward:.2f}, E|r| {size:.1e}, in {formats}")
    print(f"ratios at unchanged weights are exactly 1: {all(exact)}")
    loop.close()
    for event in read_events(loop.directory, kinds=["stage", "note"]):
        print(event.sentence())
    print(f"More: lightning-fp report {loop.directory}")


if __name__ == "__main__":
    main()
