"""What docs/hugging-face.md says of transformers.Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp import convert

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class PrecisionBoundary(transformers.TrainerCallback):
    """The page's."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.table.after_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.table.step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        where = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.table.state_dict(), where / "precision.pt")


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config)


def train(directory: Path, resume: Path | None = None) -> tuple[Any, Any]:
    model = llama()
    report = convert(model, "fp8-delayed", layers={"lm_head": "bf16", "*": "fp8-delayed"})
    table = report.precision_map
    if resume is not None:
        table.load_state_dict(torch.load(resume / "precision.pt", weights_only=True))
    args = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=True,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    callbacks = [PrecisionBoundary(table)]
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, table


def test_layers_train_in_fp8_and_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    model, table = train(tmp_path / "whole")
    assert set(table.formats().values()) == {"fp8-delayed", "bf16"}
    assert bool((table.scale_history.amax > 0).any())
    assert not all(map(torch.equal, model.state_dict().values(), llama().state_dict().values()))
    llama().load_state_dict(model.state_dict())
    again, other = train(tmp_path / "parts", tmp_path / "whole" / "checkpoint-3")
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert other.formats() == table.formats()
