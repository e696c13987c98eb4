"""Blocks that compute their activations again in backward: high precision in the memory of FP8.

Backward keeps the inputs of all layers, in high precision two to four times what FP8 keeps. A run
that just fits would thus never learn what high precision would have done, nor could it go on in
it. With each block's forward run again when its backward comes, there is no more than one block's
at a time, for about a third more of the time (Chen et al. 2016, "Training deep nets with sublinear
memory cost").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from typing import Any, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.replay.one_step import Replay
from lightning_fp.stability.replay.parity import Run


class Recomputation:
    """Of one loop: off until memory does not suffice for a replay, from then on in all replays.

    Args:
        model: gives what is trained, with its wrappers.
        layers: those whose inputs take the memory.
    """

    def __init__(self, model: Callable[[], nn.Module], layers: Collection[object]) -> None:
        self._model, self._layers = model, layers
        self._blocks: list[nn.Module] = []
        self._in_the_run = ExitStack()
        self.in_the_run = False
        """Whether the run's own steps compute activations again too."""

    def begin(self) -> bool:
        """See `Loop.recompute`."""
        if not self._blocks:
            self._blocks = blocks_of(self._model(), self._layers)
            return bool(self._blocks)
        return False

    def begin_in_the_run(self) -> int:
        """From here on the run's own steps compute activations again.

        Returns:
            The blocks that do; 0 if the model is no stack of blocks.
        """
        self.begin()
        if self._blocks and not self.in_the_run:
            self._in_the_run.enter_context(recomputed(self._blocks))
            self.in_the_run = True
        return len(self._blocks)

    def end_in_the_run(self) -> None:
        """The run's own steps keep all activations again."""
        self.close()
        self.in_the_run = False

    def close(self) -> None:
        """The run is over: the blocks are left as they were."""
        self._in_the_run.close()

    def during(self) -> AbstractContextManager[None]:
        """What stands around a replay."""
        return nullcontext() if self.in_the_run else recomputed(self._blocks)

    def run(self, run: Run) -> Run:
        """A replay that is made again where it runs out of memory.

        Args:
            run: the replay.
        """

        def recomputing(formats: Mapping[str, LinearFormat], *, observe: bool = False) -> Replay:
            with self.during():
                replay = run(formats, observe=observe)
            if replay.outcome != "out of memory" or not self.begin():
                return replay
            with self.during():
                return run(formats, observe=observe)

        return recomputing


def blocks_of(model: nn.Module, layers: Collection[object]) -> list[nn.Module]:
    """The blocks that a model is a stack of: the members of its outermost lists that hold layers.

    A Sequential of layers alone, as of a perceptron, is one block, computed again in segments.
    Blocks with batch normalization are left out, whose running statistics would be updated twice.

    Args:
        model: with its wrappers.
        layers: some of its modules.
    """
    wanted = set(map(id, layers))

    def search(module: nn.Module) -> Generator[nn.Module, None, None]:
        members = isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module.children():
            inside = [id(each) for each in child.modules()]
            held = len(wanted.intersection(inside))
            if (members and held and len(inside) > 1) or (held > 1 and _of_layers(child)):
                yield child
            elif held:
                yield from search(child)

    return [block for block in search(model) if not _normalizes_batches(block)]


def _normalizes_batches(block: nn.Module) -> bool:
    return any(isinstance(each, _BatchNorm) for each in block.modules())


def _of_layers(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it is a plain Sequential of modules that have none inside."""
    plain = type(module).forward is nn.Sequential.forward
    return plain and not any(True for each in module.children() for _ in each.children())


@contextmanager
def recomputed(blocks: Collection[nn.Module]) -> Generator[None, None, None]:
    """Within, each of these modules keeps its inputs alone for backward.

    Random numbers are the same the second time. What a block's own code does besides, to a counter
    for instance, it does twice.
    """
    before = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            again = _in_segments(block) if _of_layers(block) else _checkpointed(block.forward)
            block.forward = again
        yield
    finally:
        for block, own in before:
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)


def _in_segments(block: nn.Sequential) -> Callable[..., Any]:
    """Each begins at a layer, and keeps no more than its input.

    That is less than what FP8 keeps of a layer and what follows it: its input in one byte, and that
    of the activation function in two or four.
    """
    begins = [i for i, each in enumerate(block) if any(p.ndim > 1 for p in each.parameters())]
    bounds = [0, *begins[1:], len(block)]
    segments = [_checkpointed(block[a:b]) for a, b in itertools.pairwise(bounds)]
    return lambda x: reduce(lambda value, segment: segment(value), segments, x)
