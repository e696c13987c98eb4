"""Which snapshots are kept: ages, memory, and what a checkpoint brings back."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_fp.stability import RandomState, Snapshots, restore, stated_bytes
from lightning_fp.stability.keep.snapshot import Part


class Counter(nn.Module):
    """Knows the step it was last at."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(size))


def parts(size: int = 4) -> dict[str, Part]:
    return {"counter": Counter(size)}


def value(of: dict[str, Part]) -> float:
    counter: Any = of["counter"]
    return counter.value[0].item()


def go(of: dict[str, Part], step: int) -> None:
    counter: Any = of["counter"]
    counter.value.fill_(step)


def ages(keeper: Snapshots, step: int) -> list[int]:
    return [step - snapshot.step for snapshot in keeper.kept]


depths, rhythms, growths = st.integers(1, 4), st.integers(1, 20), st.integers(2, 5)


class TestAges:
    @given(depths, rhythms, growths, st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_at_every_step(self, depth: int, every: int, growth: int, first: int) -> None:
        """What the docstring promises, of a keeper that is asked at every step."""
        keeper = Snapshots(depth=depth, every_n_steps=every, growth=growth)
        state = parts()
        bounds = [0, *(every * growth**i for i in range(depth))]
        for done in range(min(3 * bounds[-1], 1500)):
            step = first + done
            if keeper.due(step):
                keeper.take(step, state)
            now = ages(keeper, step)
            for level, age in enumerate(now):
                assert bounds[level] <= age < bounds[level + 1]
            for back in range(min(bounds[-2], done + 1)):
                found = keeper.newest_before(step - back)
                level = next(i for i in range(1, depth) if back <= bounds[i])
                if found is None:  # the level that would be certain to have one is not there yet
                    assert done < bounds[level]
                else:
                    assert back <= step - found.step < bounds[level + 1]
            if depth > 1 and done >= every:
                assert max(now) >= every

    @given(
        depths,
        rhythms,
        growths,
        st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=60),
    )
    @settings(max_examples=100, deadline=None)
    def test_steps_that_jump(
        self, depth: int, every: int, growth: int, jumps: list[tuple[int, bool]]
    ) -> None:
        keeper = Snapshots(depth=depth, every_n_steps=every, growth=growth)
        state, step, second = parts(), 0, False
        for jump, early in jumps:
            step += jump
            if keeper.due(step):
                second = second or bool(keeper.kept)
                keeper.take(step, state)
            elif early:
                keeper.take(step, state)
                assert keeper.kept[0].step == step
            now = ages(keeper, step)
            assert now == sorted(now)
            assert len(now) <= depth
            assert now[0] < every
            if depth > 1 and second:
                assert max(now) >= every
            for level, snapshot in enumerate(keeper._levels[1:]):
                if snapshot is not None:
                    assert step - snapshot.step >= every * growth**level
            found = [keeper.newest_before(step - age) for age in now]
            assert found == keeper.kept

    def test_defaults(self) -> None:
        keeper, state, seen = Snapshots(), parts(), set()
        for step in range(1000):
            if keeper.due(step):
                keeper.take(step, state)
            if step >= 256:
                seen.add(tuple(ages(keeper, step)))
        newest, middle, oldest = zip(*seen, strict=True)
        assert (min(newest), max(newest)) == (0, 15)
        assert (min(middle), max(middle)) == (16, 63)
        assert (min(oldest), max(oldest)) == (64, 255)

    def test_each_holds_its_own_step(self) -> None:
        keeper, state = Snapshots(every_n_steps=2, growth=2, depth=4), parts()
        for step in range(100):
            go(state, step)
            if keeper.due(step):
                keeper.take(step, state)
        assert len(keeper.kept) == 4
        for snapshot in keeper.kept:
            restore(snapshot, state)
            assert value(state) == snapshot.step

    @given(depths, rhythms, growths, st.integers(0, 200), st.integers(0, 40), st.integers(1, 400))
    @settings(max_examples=60, deadline=None)
    def test_one_that_is_needed_is_held_in_the_place_of_another(
        self, depth: int, every: int, growth: int, before: int, back: int, after: int
    ) -> None:
        keeper = Snapshots(depth=depth, every_n_steps=every, growth=growth)
        state = parts()
        for step in range(before + 1):
            if keeper.due(step):
                keeper.take(step, state)
        keep_from = before - back
        needed = keeper.newest_before(keep_from) or keeper.kept[-1]
        one = needed.nbytes
        for step in range(before + 1, before + after):
            if keeper.due(step):
                keeper.take(step, state, keep_from=keep_from)
            assert needed in keeper.kept
            assert len(keeper.kept) <= depth
            assert keeper.nbytes <= depth * one
            assert ages(keeper, step) == sorted(ages(keeper, step))
        loaded = Snapshots(depth=depth, every_n_steps=every, growth=growth)
        loaded.load_state_dict(keeper.state_dict())
        assert [s.step for s in loaded.kept] == [s.step for s in keeper.kept]
        for step in range(before + after, before + after + 3 * every):
            if keeper.due(step):
                keeper.take(step, state)
        assert keeper.kept[0].step >= before + after
        assert len(keeper.kept) <= depth

    def test_a_calm_look_lets_the_only_one_be_replaced(self) -> None:
        keeper, state = Snapshots(depth=1, every_n_steps=4), parts()
        keeper.take(0, state)
        assert keeper.take(4, state, keep_from=2) is None
        assert keeper.due(5)
        assert keeper.take(6, state, keep_from=6) is not None
        assert [snapshot.step for snapshot in keeper.kept] == [6]

    def test_what_is_held_keeps_to_the_limit(self) -> None:
        state = parts(1000)
        one = stated_bytes(state)
        keeper = Snapshots(depth=3, every_n_steps=2, growth=2, limit_bytes=2 * one)
        for step in range(0, 60, 2):
            keeper.take(step, state, keep_from=None if step < 10 else 9)
            assert keeper.nbytes <= 2 * one
        assert [snapshot.step for snapshot in keeper.kept] == [58, 8]

    def test_due(self) -> None:
        keeper = Snapshots(every_n_steps=4)
        assert keeper.due(0)
        assert keeper.oldest_step is None
        assert keeper.newest_before(10**9) is None
        keeper.take(10, parts())
        assert [step for step in range(8, 17) if keeper.due(step)] == [8, 9, 14, 15, 16]
        assert keeper.newest_before(9) is None

    def test_after_a_rollback(self) -> None:
        keeper, state = Snapshots(every_n_steps=4, growth=2), parts()
        for step in range(0, 33, 4):
            keeper.take(step, state)
        kept = [snapshot.step for snapshot in keeper.kept]
        keeper.drop_after(kept[1])
        assert [snapshot.step for snapshot in keeper.kept] == kept[1:]
        assert keeper.oldest_step == kept[-1]
        keeper.take(kept[1] + 4, state)
        assert keeper.kept[0].step == kept[1] + 4

    def test_a_fit_that_starts_anew(self) -> None:
        keeper, state = Snapshots(every_n_steps=4), parts()
        for step in (0, 4, 8, 100):
            keeper.take(step, state)
        keeper.take(4, state)
        assert [snapshot.step for snapshot in keeper.kept] == [4, 0]


class TestMemory:
    def test_a_steady_state_allocates_nothing(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        state: dict[str, Part] = {"m": model, "o": optimizer, "random": RandomState}
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        keeper = Snapshots(every_n_steps=1, growth=2)
        used: set[int] = set()
        for step in range(40):
            snapshot = keeper.take(step, state)
            used.add(snapshot.memory.content.data_ptr())
            assert keeper.nbytes <= 3 * snapshot.nbytes
        assert len(used) == 3
        assert keeper.nbytes == 3 * stated_bytes(state) == keeper.stated_bytes(state)

    @given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=30))
    @settings(max_examples=60, deadline=None)
    def test_never_above_the_limit(self, run: list[tuple[int, int]]) -> None:
        """Whatever sizes the state has over time."""
        keeper = Snapshots(depth=4, every_n_steps=4, growth=2, limit_bytes=64 * 16 * 2)
        step = 0
        for jump, chunks in run:
            step += jump
            state = parts(chunks * 16)
            if stated_bytes(state) > 64 * 16 * 2:
                with pytest.raises(ValueError, match=r"limit_bytes must be at least"):
                    keeper.take(step, state)
            else:
                keeper.take(step, state)
                assert keeper.kept[0].step == step
            assert keeper.nbytes <= 64 * 16 * 2

    def test_the_limit_makes_it_shallower(self) -> None:
        state = parts(16)
        keeper = Snapshots(depth=4, every_n_steps=1, growth=2, limit_bytes=150)
        assert keeper.stated_bytes(state) == 128
        for step in range(20):
            keeper.take(step, state)
        assert ages(keeper, 19) == [0, 1]

    def test_too_large(self) -> None:
        keeper = Snapshots(limit_bytes=1000)
        with pytest.raises(
            ValueError,
            match=r"limit_bytes must be at least 1024 .*, got 1000 .*snapshot_bytes=\.\.\.",
        ):
            keeper.stated_bytes(parts(256))

    def test_clear(self) -> None:
        keeper = Snapshots(every_n_steps=1)
        for step in range(4):
            keeper.take(step, parts())
        keeper.clear()
        assert (keeper.kept, keeper.nbytes) == ([], 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depth": 0}, r"depth must be at least 1, got 0"),
            ({"every_n_steps": 0}, r"every_n_steps must be at least 1, got 0"),
            ({"growth": 1}, r"growth must be at least 2, got 1"),
            ({"limit_bytes": 0}, r"limit_bytes must be at least 1, got 0"),
        ],
    )
    def test_options(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Snapshots(**options)


class TestCheckpoint:
    def saved(self, keeper: Snapshots) -> Any:
        buffer = io.BytesIO()
        torch.save(keeper.state_dict(), buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    @given(st.integers(0, 120), st.integers(1, 4))
    @settings(max_examples=40, deadline=None)
    def test_goes_on_as_if_nothing_had_been(self, cut: int, depth: int) -> None:
        whole, state = Snapshots(depth=depth, every_n_steps=3, growth=2), parts()
        loaded: Snapshots | None = None
        for step in range(160):
            go(state, step)
            if step == cut:
                loaded = Snapshots(depth=depth, every_n_steps=3, growth=2)
                loaded.load_state_dict(self.saved(whole))
            for keeper in filter(None, (whole, loaded)):
                if keeper.due(step):
                    keeper.take(step, state)
            if loaded is not None:
                assert ages(loaded, step) == ages(whole, step)
        assert loaded is not None
        for one, other in zip(whole.kept, loaded.kept, strict=True):
            for snapshot in (one, other):
                restore(snapshot, state)
                assert value(state) == one.step

    def test_what_is_being_saved_is_not_written_over(self) -> None:
        keeper, state = Snapshots(every_n_steps=1, depth=1), parts()
        go(state, 1)
        keeper.take(1, state)
        saved = keeper.state_dict()  # still being written out by another thread
        for step in range(2, 5):
            go(state, step)
            keeper.take(step, state)
        loaded = Snapshots(depth=1)
        loaded.load_state_dict(saved)
        restore(loaded.kept[0], state)
        assert value(state) == 1

    def test_shallower_than_it_was(self) -> None:
        keeper, state = Snapshots(every_n_steps=1, growth=2), parts()
        for step in range(9):
            keeper.take(step, state)
        loaded = Snapshots(depth=1, every_n_steps=1)
        loaded.load_state_dict(self.saved(keeper))
        assert ages(loaded, 8) == [0]

    def test_another_version(self) -> None:
        with pytest.raises(ValueError, match=r"must have version 1, got 2"):
            Snapshots().load_state_dict({"version": 2, "levels": []})
