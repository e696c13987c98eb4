"""What the ring gives back is what the training step got, all of it or nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_fp.stability import BatchRing, MicroBatch, RandomState, RecordedStep
from lightning_fp.stability.keep.host_batch import batch_bytes, copy_batch, host_copy

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Example:
    tokens: Tensor
    weight: float = 1.0

    def __post_init__(self) -> None:
        assert not hasattr(self, "seen"), "made anew"
        self.seen = True


@dataclasses.dataclass(frozen=True)
class Frozen:
    tokens: Tensor


class InPlace(UserDict):  # type: ignore[type-arg]
    """Moves itself, as transformers' BatchEncoding does."""

    def to(self, device: str) -> InPlace:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """Clones itself, as PyG's batches do."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes

    def clone(self) -> Graph:
        return Graph(self.nodes.clone())

    def to(self, device: str) -> Graph:
        return self

    def __deepcopy__(self, memo: Any) -> Graph:
        raise AssertionError("a clone is cheaper")


class Rows(list):  # type: ignore[type-arg]
    """A list with a name."""


class Holder:
    """Is moved by the user's own code."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.itself = tokens, self


class Stubborn:
    """Cannot be copied."""

    def to(self, device: str) -> Stubborn:
        raise RuntimeError("no")


def batches() -> dict[str, Any]:
    tokens = torch.arange(6).view(2, 3)
    return {
        "tensor": tokens.clone(),
        "float": torch.randn(4, 4),
        "expanded": torch.randn(1, 4).expand(5, 4),
        "strided": torch.randn(4, 6)[:, ::2],
        "empty": torch.empty(0, 3),
        "pair": [tokens.clone(), tokens.clone()],
        "tuple": (tokens.clone(), "name", 3, None, 2.5),
        "dict": {"input_ids": tokens.clone(), "deep": {"mask": tokens > 2}, "names": ["a", "b"]},
        "ordered": OrderedDict(a=tokens.clone()),
        "userdict": UserDict(a=tokens.clone()),
        "namedtuple": Pair(tokens.clone(), {"z": tokens.clone()}),
        "dataclass": Example(tokens.clone()),
        "frozen": Frozen(tokens.clone()),
        "in place": InPlace(a=tokens.clone()),
        "clone": Graph(tokens.clone()),
        "packed": pack_sequence([torch.randn(3), torch.randn(2)]),
        "read only": MappingProxyType({"a": tokens.clone()}),
        "list of a kind": Rows([tokens.clone()]),
        "object": Holder(tokens.clone()),
        "numpy": np.arange(5.0),
        "sparse": torch.eye(3).to_sparse(),
        "nothing": None,
    }


def tensors(batch: Any) -> list[Any]:
    """All that a training step could write into."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return [batch]
    if isinstance(batch, (dict, UserDict, MappingProxyType)):
        return [t for value in batch.values() for t in tensors(value)]
    if isinstance(batch, (list, tuple)):
        return [t for value in batch for t in tensors(value)]
    if isinstance(batch, Holder):
        return [batch.tokens]
    return tensors(vars(batch)) if hasattr(batch, "__dict__") else []


def values(batch: Any) -> list[Any]:
    dense = [t.to_dense() if isinstance(t, Tensor) else t for t in tensors(batch)]
    return [t.tolist() for t in dense]


def spoil(tensor: Any) -> None:
    if isinstance(tensor, Tensor) and tensor.dtype is torch.bool:
        tensor.logical_not_()
    elif isinstance(tensor, Tensor) and tensor.is_sparse:
        tensor.mul_(2)
    elif isinstance(tensor, Tensor) and 0 in tensor.stride():
        tensor[0] += 1
    else:
        tensor += 1


def step_with(ring: BatchRing, step: int, batch: Any = None, count: int = 1) -> None:
    ring.begin(step, [[{"lr": 0.1 * step, "betas": (0.9, 0.95)}]])
    for index in range(count):
        ring.add(torch.full((4,), step) if batch is None else batch, index, RandomState.capture())
    ring.end(loss=float(step))


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class TestCopies:
    @pytest.mark.parametrize("copying", [host_copy, copy_batch])
    @pytest.mark.parametrize("name", batches())
    def test_alike_and_out_of_reach(self, name: str, copying: Any) -> None:
        batch = batches()[name]
        before, kind = values(batch), type(batch)
        copied = copying(batch)
        assert type(copied) is kind
        assert values(copied) == before
        assert values(batch) == before
        for tensor in tensors(batch):
            spoil(tensor)
        assert values(copied) == before
        for one, other in zip(tensors(copied), tensors(batch), strict=True):
            assert one is not other

    def test_what_is_no_tensor_stays(self) -> None:
        marker = object()
        assert host_copy({"a": [marker, "text"]}) == {"a": [marker, "text"]}
        assert host_copy(marker) is marker

    def test_gradients_of_inputs(self) -> None:
        batch = torch.ones(2, requires_grad=True)
        copied = host_copy({"x": batch * 1, "leaf": batch})
        assert copied["leaf"].requires_grad
        assert copied["x"].is_leaf

    @pytest.mark.parametrize(
        "batch",
        [
            torch.ones(10_000),
            {"a": torch.ones(10_000), "b": [torch.ones(5_000, dtype=torch.int64)]},
            Example(torch.ones(10_000)),
            InPlace(a=torch.ones(10_000)),
            Graph(torch.ones(10_000)),
            (np.ones(10_000),),
        ],
    )
    def test_bytes(self, batch: Any) -> None:
        real = sum(t.nbytes for t in tensors(batch))
        assert batch_bytes(batch) == pytest.approx(real, rel=0.05)


class TestRecording:
    def test_a_step(self) -> None:
        ring, torch_rng = BatchRing(), torch.get_rng_state()
        ring.begin(7, [[{"lr": 0.5}]])
        ring.add({"x": torch.ones(2)}, 14, RandomState.capture())
        torch.rand(1)
        ring.add({"x": torch.zeros(2)}, 15, RandomState.capture(), dataloader_idx=1)
        assert ring.last is None
        assert ring.since(7) == []
        ring.end(loss=2.0, grad_norm=0.5, skipped=True)
        (step,) = ring.since(7) or []
        assert (step.step, step.loss, step.grad_norm, step.skipped) == (7, 2.0, 0.5, True)
        assert step.hyperparameters == [[{"lr": 0.5}]]
        assert [m.batch_idx for m in step.micro_batches] == [14, 15]
        assert [m.dataloader_idx for m in step.micro_batches] == [0, 1]
        assert [m.batch["x"].tolist() for m in step.micro_batches] == [[1, 1], [0, 0]]
        first, second = (m.rng.torch for m in step.micro_batches)
        assert torch.equal(first, torch_rng)
        assert not torch.equal(second, torch_rng)

    def test_known_later(self) -> None:
        ring = BatchRing()
        ring.begin(3, [[{"lr": 0.1}]])
        ring.end([[{"lr": torch.tensor(0.25)}]])
        step_with(ring, 4)
        ring.set_results(3, loss=1.5, grad_norm=2.0, skipped=True)
        ring.set_results(99, loss=1.5)
        assert ring.rates() == [0.25, 0.4]
        assert ring.first is not None
        assert (ring.first.loss, ring.first.grad_norm, ring.first.skipped) == (1.5, 2.0, True)
        assert ring.last is not None
        assert ring.last.loss == 4.0

    def test_since(self) -> None:
        ring = BatchRing()
        assert ring.since(0) is None
        for step in (10, 11, 13):  # two optimizers count twice
            step_with(ring, step)
        assert ring.since(9) is None
        assert _steps(ring, 10) == [10, 11, 13]
        assert _steps(ring, 12) == [13]
        assert ring.since(14) == []

    def test_dropped_before(self) -> None:
        ring = BatchRing()
        for step in range(5):
            step_with(ring, step)
        ring.drop_before(3)
        assert ring.since(2) is None
        assert _steps(ring, 3) == [3, 4]

    def test_dropped_from(self) -> None:
        ring = BatchRing()
        for step in range(2, 6):
            step_with(ring, step)
        ring.drop_from(4)
        assert _steps(ring, 2) == [2, 3]
        step_with(ring, 4)
        assert _steps(ring, 2) == [2, 3, 4]
        ring.drop_from(0)
        assert ring.since(2) is None
        assert ring.nbytes == 0
        step_with(ring, 1)
        assert _steps(ring, 1) == [1]

    def test_a_step_again(self) -> None:
        """The same step, as after an exception in its middle that the user caught."""
        ring = BatchRing()
        step_with(ring, 1)
        nbytes = ring.nbytes
        ring.begin(2)
        ring.add(torch.ones(3), 0, RandomState.capture())
        step_with(ring, 2)
        assert ring.nbytes == 2 * nbytes
        step_with(ring, 2)
        assert ring.nbytes == 2 * nbytes
        assert _steps(ring, 1) == [1, 2]

    def test_a_step_without_end_is_a_gap(self) -> None:
        ring = BatchRing()
        step_with(ring, 1)
        ring.begin(2)
        ring.add(torch.ones(3), 0, RandomState.capture())
        step_with(ring, 3)
        assert ring.since(1) is None
        assert ring.since(2) is None
        assert _steps(ring, 3) == [3]

    def test_a_batch_that_cannot_be_copied_is_a_gap(self, caplog: pytest.LogCaptureFixture) -> None:
        ring = BatchRing()
        step_with(ring, 1)
        step_with(ring, 2, Stubborn(), count=2)
        step_with(ring, 3, Stubborn())
        step_with(ring, 4)
        assert ring.since(2) is None
        assert _steps(ring, 4) == [4]
        assert len(caplog.records) == 1
        assert "cannot be copied" in caplog.text

    def test_nothing_begun(self) -> None:
        ring = BatchRing()
        ring.add(torch.ones(1), 0, RandomState.capture())
        ring.end()
        assert (ring.nbytes, ring.last, ring.rates()) == (0, None, [])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_bytes": 0}, r"max_bytes must be at least 1, got 0"),
            ({"max_steps": 0}, r"max_steps must be at least 1 or None, got 0"),
        ],
    )
    def test_options(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BatchRing(**options)


def _steps(ring: BatchRing, step: int) -> list[int]:
    since = ring.since(step)
    assert since is not None
    return [recorded.step for recorded in since]


class TestMemory:
    def test_as_stated(self) -> None:
        """Against all the tensors there are; the random states aside."""

        def held() -> list[Tensor]:
            gc.collect()
            return [t for t in gc.get_objects() if type(t) is Tensor and not t.is_sparse]

        ring, batch, rng = BatchRing(), {"x": torch.randn(64, 256)}, RandomState.capture()
        before = held()  # kept, so that nothing of it is freed and its place taken
        known = {tensor.data_ptr() for tensor in before}
        for step in range(10):
            ring.begin(step)
            ring.add(batch, 0, rng)
            ring.end()
        new = {t.data_ptr(): t.untyped_storage().nbytes() for t in held()}
        taken = sum(size for pointer, size in new.items() if pointer not in known)
        assert taken == pytest.approx(ring.nbytes - 10 * rng.nbytes, rel=0.05)

    def test_oldest_steps_go(self) -> None:
        one = MicroBatch(batch=torch.ones(1000), batch_idx=0, rng=RandomState.capture()).nbytes
        ring = BatchRing(max_bytes=3 * one)
        for step in range(6):
            step_with(ring, step, torch.ones(1000))
        assert ring.since(2) is None
        assert _steps(ring, 3) == [3, 4, 5]
        assert ring.nbytes == 3 * one
        step_with(ring, 6, torch.ones(1000), count=2)
        assert _steps(ring, 5) == [5, 6]
        step_with(ring, 7, torch.ones(1000), count=4)
        assert (ring.nbytes, ring.since(7)) == (0, None)
        step_with(ring, 8, torch.ones(1000))
        assert _steps(ring, 8) == [8]

    def test_batch_above_the_bound(self) -> None:
        ring = BatchRing(max_bytes=100_000)
        step_with(ring, 1)
        step_with(ring, 2, torch.ones(50_000))
        assert ring.since(1) is None
        assert ring.since(2) is None
        assert ring.since(3) == []
        assert ring.nbytes == 0

    def test_most_steps(self) -> None:
        ring = BatchRing(max_steps=2)
        for step in range(5):
            step_with(ring, step)
        assert ring.since(2) is None
        assert _steps(ring, 3) == [3, 4]


class TestCheckpoint:
    def test_goes_on(self) -> None:
        ring = BatchRing()
        for step in range(3, 6):
            step_with(ring, step, {"x": (torch.full((2,), step), ["a", None])}, count=2)
        ring.begin(6)  # not in the checkpoint
        loaded = BatchRing()
        loaded.load_state_dict(saved_and_loaded(ring.state_dict()))
        assert loaded.since(2) is None
        for one, other in zip(ring.since(3) or [], loaded.since(3) or [], strict=True):
            assert _comparable(one) == _comparable(other)
        ring.end()
        for each in (ring, loaded):
            step_with(each, 6)
        assert _steps(loaded, 3) == [3, 4, 5, 6]
        assert loaded.nbytes == ring.nbytes

    def test_bounds_hold_for_what_is_loaded(self) -> None:
        ring = BatchRing()
        for step in range(6):
            step_with(ring, step)
        for smaller in (BatchRing(max_steps=2), BatchRing(max_bytes=ring.nbytes // 3)):
            smaller.load_state_dict(saved_and_loaded(ring.state_dict()))
            assert smaller.since(3) is None
            assert _steps(smaller, 4) == [4, 5]

    def test_objects_are_not_saved(self, caplog: pytest.LogCaptureFixture) -> None:
        ring = BatchRing()
        step_with(ring, 0)
        step_with(ring, 1, Example(torch.ones(2)))
        state = saved_and_loaded(ring.state_dict())
        assert "are not saved" in caplog.text
        loaded = BatchRing()
        loaded.load_state_dict(state)
        assert loaded.since(0) is None
        assert loaded.since(1) is None
        step_with(loaded, 2)
        assert _steps(loaded, 2) == [2]

    def test_where_the_loop_stood_goes_along(self) -> None:
        ring, position = BatchRing(), {"batch": [{"ready": 3}, {"ready": 1}], "last": False}
        ring.begin(0, [[{"lr": 0.1}]])
        ring.add(torch.ones(2), 1, RandomState.capture(), position=position)
        ring.end([[{"lr": 0.2}]])
        loaded = BatchRing()
        loaded.load_state_dict(saved_and_loaded(ring.state_dict()))
        step = loaded.last
        assert step is not None
        assert step.micro_batches[0].position == position
        assert (step.begun_with, step.hyperparameters) == ([[{"lr": 0.1}]], [[{"lr": 0.2}]])

    def test_steps_recorded_in_the_middle_of_their_way_are_dropped(self) -> None:
        ring = BatchRing()
        step_with(ring, 0)
        state = saved_and_loaded(ring.state_dict())
        del state["steps"][0]["begun_with"]
        loaded = BatchRing()
        loaded.load_state_dict(state)
        assert loaded.last is None
        assert loaded.since(0) is None

    def test_another_version(self) -> None:
        with pytest.raises(ValueError, match=r"must have version 1, got None"):
            BatchRing().load_state_dict({})


def _comparable(step: RecordedStep) -> Any:
    micro = [(values(m.batch), m.batch_idx, m.rng.python) for m in step.micro_batches]
    return {**vars(step), "micro_batches": micro}


class Ring(RuleBasedStateMachine):
    """Against a plain list of all steps ever done, with the same rules in words."""

    BOUND = 40_000 * 4

    def __init__(self) -> None:
        super().__init__()
        self.ring = BatchRing(max_bytes=self.BOUND)
        self.step = 0
        self.done: list[int] = []  # steps of the present history, in order
        self.begun = 0  # the first step that was recorded

    @rule(count=st.integers(1, 3), size=st.sampled_from([10, 1000, 9000]), jump=st.integers(1, 2))
    def train(self, count: int, size: int, jump: int) -> None:
        step_with(self.ring, self.step, torch.full((size,), float(self.step)), count)
        self.done.append(self.step)
        self.step += jump

    @rule()
    def too_large(self) -> None:
        step_with(self.ring, self.step, torch.ones(self.BOUND))
        self.done.append(self.step)
        assert self.ring.since(self.step) is None
        self.step += 1

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def roll_back(self, data: Any) -> None:
        to = data.draw(st.sampled_from(self.done))
        self.ring.drop_from(to)
        self.done = [step for step in self.done if step < to]
        self.step = to

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def snapshot_dropped(self, data: Any) -> None:
        self.ring.drop_before(data.draw(st.sampled_from(self.done)))

    @rule()
    def checkpoint(self) -> None:
        state = copy.deepcopy(self.ring.state_dict())
        self.ring = BatchRing(max_bytes=self.BOUND)
        self.ring.load_state_dict(state)

    @invariant()
    def all_or_nothing(self) -> None:
        assert 0 <= self.ring.nbytes <= self.BOUND
        for step in self.done:
            since = self.ring.since(step)
            if since is not None:
                assert [s.step for s in since] == [s for s in self.done if s >= step]
                for recorded in since:
                    assert recorded.loss == recorded.step
                    for micro in recorded.micro_batches:
                        assert (micro.batch == recorded.step).all()
        kept = self.ring.since(self.ring.first.step) if self.ring.first is not None else []
        assert kept is not None
        nbytes = sum(micro.nbytes for step in kept for micro in step.micro_batches)
        assert nbytes == self.ring.nbytes


TestRing = Ring.TestCase
TestRing.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_keeps_as_many_as_fit(fit: int, count: int) -> None:
    rng = RandomState.capture()
    one = MicroBatch(batch=torch.ones(100), batch_idx=0, rng=rng).nbytes
    ring = BatchRing(max_bytes=fit * one)
    for step in range(count):
        ring.begin(step)
        ring.add(torch.ones(100), 0, rng)
        ring.end()
    assert _steps(ring, max(0, count - fit)) == list(range(max(0, count - fit), count))


@pytest.mark.gpu
def test_from_cuda() -> None:
    """Pinned, and as the batch was, although the step writes into it at once."""
    ring = BatchRing()
    for step in range(20):
        batch = {"x": torch.full((2**20,), float(step), device="cuda")}
        ring.begin(step)
        torch.cuda._sleep(10**7)
        ring.add(batch, 0, RandomState.capture())
        batch["x"].zero_()
        ring.end()
    for recorded in ring.since(0) or []:
        batch = recorded.micro_batches[0].batch["x"]
        assert batch.is_pinned()
        assert (batch == recorded.step).all()
