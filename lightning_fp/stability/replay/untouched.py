"""Run a training step and leave no trace of it in the model.

A copy of the model would be the simple way, and is twice the memory; nor would it be the same model
to hooks, wrappers and compiled code. So the model itself is run, and what a forward and backward
can write is kept aside and put back: in place, since others hold the same tensors and containers.
Weights in training are not among it: who lets an optimizer step within puts them back himself. What
is not seen is what a step does to objects of other classes, to files, over the network: that it
does again.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_fp.stability.keep.own_state import OwnState
from lightning_fp.stability.keep.random_state import RandomState

Stance = Literal["force_eager", "eager_on_recompile", "default"]
"""See `torch.compiler.set_stance`."""

Undo = Callable[[], object]

_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, deque, set))
_UNCHANGING = frozenset((bool, int, float, str, type(None)))
_DEPTH = 2
"""How deep containers are looked into: `self.outputs = {"loss": [...]}` is two deep."""

_MOST_ITEMS = 1024
"""A container with more is a record that only grows: what is in it is not looked into."""

_OF_STEPS = ("state", "param_groups")
"""What only an optimizer's step writes of an optimizer."""


@contextmanager
def untouched(
    model: nn.Module, others: Sequence[object] = (), *, stance: Stance = "force_eager"
) -> Generator[None, None, None]:
    """Undo on leaving what a forward and backward of the block did, also after an exception.

    Undone are: gradients (moved aside, not copied), all buffers and tensor attributes of all
    modules, torchmetrics states, other attributes (numbers, text, arrays, generators of random
    numbers, lists and dicts of these and of tensors) with what was put into them, training flags
    and `requires_grad`, and the random state. Objects of other classes stay the same objects, and
    are not looked into. Parameters that no optimizer trains, such as an averaged teacher's, are
    copied if they are no larger than the trained ones; weights in training are not. Call it between
    optimizer steps, when no graph waits for its backward. Within, gradients are enabled, and
    compiled code follows `stance`.

    Args:
        model: the module that is called, with its wrappers.
        others: further objects whose attributes are kept, such as callbacks; of optimizers all but
            their state and groups.
        stance: what compiled code does: run eagerly; run as it was compiled, eagerly where that
            would take a new graph; or be compiled as it comes.
    """
    with ExitStack() as undo:
        undo.callback(RandomState.capture().restore)
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        undo.enter_context(_parameters_kept(list(model.parameters())))
        undo.enter_context(_attributes_kept(model, others))
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(torch.compiler.set_stance(stance))
        yield


@contextmanager
def _parameters_kept(parameters: list[nn.Parameter]) -> Generator[None, None, None]:
    """Gradients aside; no optimizer steps inside a backward hook; frozen parameters copied."""
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = [p for p in parameters if not p.requires_grad]
    few = sum(p.numel() for p in frozen) <= trained
    undo = [_keep_tensor(parameter) for parameter in frozen] if few else []
    for parameter in parameters:
        parameter.grad = None
        undo += _hooks_aside(parameter)
    try:
        yield
    finally:
        for parameter, grad, requires_grad in kept:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        for step in undo:
            step()


def _hooks_aside(parameter: nn.Parameter) -> list[Undo]:
    """Users' hooks that run when a gradient is ready, and may step an optimizer; not torch's."""
    hooks: dict[int, Any] | None = getattr(parameter, "_post_accumulate_grad_hooks", None)
    if not hooks:
        return []
    before = dict(hooks)
    for key, hook in before.items():
        if not str(getattr(hook, "__module__", "")).startswith("torch.distributed"):
            del hooks[key]
    return [partial(hooks.update, before)]


@contextmanager
def _attributes_kept(model: nn.Module, others: Iterable[object]) -> Generator[None, None, None]:
    seen: set[int] = set()
    undo = [step for module in model.modules() for step in _keep_object(module, seen)]
    undo += [step for other in others for step in _keep_object(other, seen)]
    try:
        yield
    except BaseException:
        _recover_sharded(model)
        raise
    finally:
        for step in undo:
            step()


def _keep_object(owner: Any, seen: set[int]) -> list[Undo]:
    """Attributes by reference, and the contents of those that a step may write into."""
    if id(owner) in seen:
        return []
    seen.add(id(owner))
    attributes = vars(owner)
    before = dict(attributes)

    def restore() -> None:
        for name in attributes.keys() - before.keys():
            del attributes[name]
        for name, value in before.items():
            if attributes.get(name, restore) is not value:
                attributes[name] = value

    undo: list[Undo] = [restore]
    # FSDP2 exchanges parameters as it gathers and frees
    apart = _OF_STEPS if isinstance(owner, Optimizer) else ("_parameters",)
    if isinstance(owner, nn.Module):
        for buffer in owner.buffers(recurse=False):
            seen.add(id(buffer))
            undo.append(_keep_tensor(buffer))
    for name, value in before.items():
        if name not in apart:
            undo += _keep(value, seen, _DEPTH)
    return undo


def _keep(value: Any, seen: set[int], depth: int) -> list[Undo]:
    """What takes `value` back to its contents of now; empty where they are not looked into."""
    kind = type(value)
    if kind in _UNCHANGING:
        return []
    if kind in _CONTAINERS:
        if depth == 0 or id(value) in seen:
            return []
        seen.add(id(value))
        undo: list[Undo] = [partial(_refill, value, _contents(value), value.copy())]
        if value and len(value) <= _MOST_ITEMS:
            inside = list(value.values() if isinstance(value, dict) else value)
            undo += [step for item in inside for step in _keep(item, seen, depth - 1)]
        return undo
    if isinstance(value, nn.Module):
        return [step for module in value.modules() for step in _keep_object(module, seen)]
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or id(value) in seen:
            return []
        seen.add(id(value))
        return [_keep_tensor(value, depth < _DEPTH)]
    state = OwnState.of(value)
    return [] if state is None else [partial(state.put_into, value)]


def _refill(container: Any, contents: list[Any], before: Any) -> None:
    """The same objects in the same order; untouched where they are."""
    now = _contents(container)
    if len(now) == len(contents) and all(map(is_, now, contents)):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(before)
    else:
        container.extend(before)


def _contents(container: Any) -> list[Any]:
    if not container:
        return []
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _keep_tensor(value: Tensor, in_container: bool = False) -> Undo:
    """The same tensor with the same contents."""
    before, version = value.detach().clone(), _version(value)

    def restore() -> None:
        # Not all who write into a tensor count its version up, and to compare would wait for the
        # device: so an attribute is written in any case. Those in lists may be many, or of a graph.
        if in_container and version is not None and _version(value) == version:
            return
        with torch.no_grad(), torch.inference_mode(value.is_inference()):
            value.copy_(before)

    return restore


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


def _recover_sharded(model: nn.Module) -> None:
    """After an exception in mid-pass FSDP2 has parameters gathered and events waiting."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reset = getattr(module, "reset_iter_state", None)  # torch >= 2.12
            if reset is not None:
                reset()
            return
