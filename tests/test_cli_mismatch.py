"""`lightning-fp mismatch`: the contract of factories, and figures that can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_fp.cli import main
from lightning_fp.cli.commands.mismatch_sides import (
    load_policy,
    rollout_logprobs,
    training_logprobs,
)
from lightning_fp.layers import linear_format
from lightning_fp.records import MismatchWriter

FACTORIES = """
import torch
from tests.helper import TinyGPT

class Model(TinyGPT):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()

def model():
    return Model()

def with_tokens():
    return Model(), torch.arange(60).view(4, 15)

def with_decode():
    return Model(), torch.arange(60).view(4, 15), lambda model, tokens: model(tokens) * 1.01

class Output:
    def __init__(self, logits):
        self.logits = logits

class Transformer(Model):
    def forward(self, tokens):
        return Output(super().forward(tokens))

class Flat(Model):
    def forward(self, tokens):
        return super().forward(tokens).flatten(0, 1)

class Broken(Model):
    def forward(self, tokens):
        if self.lm_head.weight.dtype == torch.float16:
            raise RuntimeError("no kernel for Half")
        return super().forward(tokens)

def nothing():
    return 3

def float_tokens():
    return Model(), torch.rand(4, 15)

def bad_decode():
    return Model(), torch.arange(60).view(4, 15), "decode"
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["mismatch", *args, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["mismatch", *args, "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_formats_stand_in_the_order_of_their_bits(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(
        capsys,
        f"{factories}:model",
        "--length=16",
        "--formats=bf16,fp16,fp8-dynamic,fp32",
        "--layers=*=fp8-dynamic",
    )
    bf16, fp16, fp8, fp32 = found["formats"]
    assert (found["tokens"], found["sampled"], found["decode"]) == (8 * 15, True, False)
    assert bf16["to_first"] == {"logprob_abs_diff_mean": 1.0, "k3_kl": 1.0}
    assert 1 / 12 < fp16["to_first"]["logprob_abs_diff_mean"] < 1 / 5
    assert fp16["to_first"]["k3_kl"] < 1 / 30
    assert fp8["to_first"]["logprob_abs_diff_mean"] > 2
    assert fp32["values"]["logprob_abs_diff_max"] < 1e-5
    assert fp32["error"] == 0.0
    assert fp8["error"] > bf16["error"] > fp16["error"] > 0


def test_given_tokens_decode_and_format_of_the_engine(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The decode's error, made up, is found; the engine keeps its format."""
    whole = run_json(capsys, f"{factories}:with_tokens", "--formats=fp32")
    made_up = run_json(capsys, f"{factories}:with_decode", "--formats=fp32,bf16", "--rollout=fp32")
    assert not made_up["sampled"]
    assert made_up["decode"]
    assert [row["rollout"] for row in made_up["formats"]] == ["fp32", "fp32"]
    sizes = [f["formats"][0]["values"]["logprob_abs_diff_mean"] for f in (whole, made_up)]
    assert sizes[0] < 1e-6 < 1e-3 < sizes[1]


def test_what_is_measured(factories: str) -> None:
    """Training's side is the model under autocast, the engine's is the model in its dtype."""
    policy = load_policy(f"{factories}:with_tokens", batch=1, length=2, device=torch.device("cpu"))
    model, tokens, bf16 = policy.model, policy.tokens, linear_format("bf16")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train, rollout = training_logprobs(policy, bf16), rollout_logprobs(policy, bf16)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    def logprobs(scores: torch.Tensor) -> torch.Tensor:
        chosen = scores[:, :-1].float().log_softmax(dim=-1).gather(2, tokens[:, 1:, None])
        return chosen.squeeze(2)

    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(train, logprobs(model(tokens)))
        model.bfloat16()
        alone = torch.cat([model(row[None]) for row in tokens])
    assert torch.equal(rollout, logprobs(alone))


def test_a_transformers_output_and_the_table(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mismatch", f"{factories}:Transformer", "--length=4", "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "fp8-dynamic" in printed
    assert "24 tokens, sampled from the model in fp32" in printed
    assert "for lack of a decode" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "must return a model, (model, tokens) or (model, tokens, decode), got int"),
        (["float_tokens"], "must be integers [batch, tokens], at least 2 tokens, got (4, 15)"),
        (["bad_decode"], "must be a function of (model, tokens), got str"),
        (["Flat"], "must give logits [batch, tokens, vocabulary], got (1, 256) for tokens (1, 1)"),
        (["Broken", "--length=4"], "failed at rollout in fp16: RuntimeError: no kernel for Half"),
        (["model", "--length=40"], "the model failed at sampling: "),
        (["model", "--length=1"], "--length must be at least 2, got 1"),
        (["model", "--formats=bf16,fp9"], "format must be one of"),
        (["model", "--formats=fp8-delayed"], "must not need a history, got 'fp8-delayed'"),
        (
            ["model", "--length=4", "--layers=*norm=bf16"],
            "matches only modules that cannot be converted",
        ),
        (["missing"], "has no 'missing'"),
    ],
)
def test_refused(
    factories: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    factory, *options = args
    assert message in refused(capsys, f"{factories}:{factory}", *options)


class TestRun:
    """Of a run's records, in the place of a factory."""

    def run(self, directory: Path, *, causes: bool = True) -> str:
        writer = MismatchWriter(directory)
        for step in range(1, 10):
            grown = 1 if step < 7 else 20
            writer.append(step, {"logprob_abs_diff_mean": 1e-3 * grown, "k3_kl": 1e-6 * grown**2})
            if causes:
                stale = 0.1 if step < 7 else 0.9
                writer.append_causes(step, {"precision": 1 - stale, "staleness": stale})
        return str(directory)

    def test_says_why_and_what_to_do(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["mismatch", self.run(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "steps 7-9" in printed
        assert "of k3: staleness" in printed
        assert "at the end mostly staleness: synchronise the weights more often" in printed
        assert "routing" not in printed

    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["mismatch", self.run(tmp_path), "--json"]) == 0
        parts = json.loads(capsys.readouterr().out)["parts"]
        assert [part["main"] for part in parts] == ["precision", "precision", "staleness"]
        assert parts[2]["k3_kl"] == pytest.approx(4e-4)
        assert parts[2]["shares"] == {"precision": pytest.approx(0.1), "staleness": 0.9}

    def test_without_causes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["mismatch", self.run(tmp_path, causes=False)]) == 0
        assert "causes were not told apart" in capsys.readouterr().out

    def test_nothing_measured(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["mismatch", str(tmp_path)]) != 0
        assert "has measured no mismatch" in capsys.readouterr().err
