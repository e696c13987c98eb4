"""An optimizer's state as a tree, put back exactly, and its size before there is any.

`Optimizer.load_state_dict` is not exact: it casts state to the dtype of its parameter, float32
moments of bf16 weights too, and puts new tensors in the place of those that compiled code and CUDA
graphs hold.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from lightning_fp.stability.keep.host_memory import Layout
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.stability.keep.state_tree import TensorCollector, Tree, TreeRestorer


def collect_optimizer(optimizer: Optimizer, collected: TensorCollector) -> Tree:
    """State of each parameter and entries of each group; not the parameters."""
    optimizer = _unwrapped(optimizer)
    numbers = _numbers(optimizer)
    state = [
        [numbers.get(id(key)), None if id(key) in numbers else key, collected.tree(value)]
        for key, value in optimizer.state.items()
    ]
    groups = [
        [
            len(group["params"]),
            [[name, collected.tree(value)] for name, value in group.items() if name != "params"],
        ]
        for group in optimizer.param_groups
    ]
    return ("optimizer", state, groups)


def rebuild_optimizer(name: str, optimizer: Optimizer, tree: Tree, rebuilt: TreeRestorer) -> Any:
    """Prepare to put the state back.

    Groups that were added since stay, with their parameters' state gone.

    Returns:
        What does it; nothing is changed before.

    Raises:
        ValueError: if the groups' parameters are not those of the snapshot.
    """
    optimizer = _unwrapped(optimizer)
    _, saved_state, saved_groups = tree
    counts = [len(group["params"]) for group in optimizer.param_groups]
    saved_counts = [count for count, _ in saved_groups]
    if counts[: len(saved_counts)] != saved_counts:
        raise ValueError(
            f"part {name!r} must have the parameter groups of the snapshot, of {saved_counts}"
            f" parameters, got {counts}; take a new snapshot after changing them"
        )
    parameters = list(_parameters(optimizer))
    state: list[tuple[Any, Any]] = []
    for number, key, value in saved_state:
        key = key if number is None else parameters[number]
        state.append((key, rebuilt.value(value, optimizer.state.get(key))))
    groups = [
        {key: rebuilt.value(value, group.get(key)) for key, value in entries}
        for group, (_, entries) in zip(optimizer.param_groups, saved_groups, strict=False)
    ]

    def put_back() -> None:
        before: dict[Any, Any] = dict(optimizer.state)
        optimizer.state.clear()
        for key, value in state:
            known = before.get(key)
            if type(known) is dict and type(value) is dict:  # others may hold it
                known.clear()
                known.update(value)
                value = known
            optimizer.state[key] = value
        for group, entries in zip(optimizer.param_groups, groups, strict=False):
            for gained in group.keys() - entries.keys() - {"params"}:
                del group[gained]
            group.update(entries)

    return put_back


def stepped_tensors(optimizer: Optimizer) -> Iterator[int]:
    """The `id` of what only the optimizer's step writes."""
    optimizer = _unwrapped(optimizer)
    collected = TensorCollector()
    collected.tree(list(_parameters(optimizer)))
    collected.tree(list(optimizer.state.values()))
    return (id(tensor) for tensor in collected.tensors)


def state_to_come(optimizer: Optimizer) -> int:
    """Bytes of a snapshot that the state will take which a step makes for parameters without any.

    Found by a step on tensors without contents. What that cannot tell counts as nothing: LBFGS,
    whose history grows, and optimizers that need real tensors.
    """
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, LBFGS):
        return 0
    # Stochastic rounding draws random numbers in a step, and the run must not notice this one.
    random = RandomState.capture()
    try:
        with torch.compiler.set_stance("force_eager"):
            return _after_step_without_contents(optimizer)
    except Exception:  # whatever an optimizer may raise that does not expect such tensors
        return 0
    finally:
        random.restore()


def _after_step_without_contents(optimizer: Optimizer) -> int:
    groups: list[dict[str, Any]] = []
    # Fused and capturable steps refuse the meta device, and make the same state.
    plain = {"foreach": False, "fused": False, "capturable": False}
    for group in optimizer.param_groups:
        fresh = [p for p in group["params"] if p.requires_grad and p not in optimizer.state]
        entries = {key: plain.get(key, value) for key, value in group.items()}
        groups.append({**entries, "params": [_without_contents(p) for p in fresh]})
    shell: Any = object.__new__(type(optimizer))
    vars(shell).update(vars(optimizer))
    shell.param_groups, shell.state = groups, defaultdict(dict)
    shell._optimizer_step_pre_hooks = OrderedDict()
    shell._optimizer_step_post_hooks = OrderedDict()
    step = _bare_step(type(optimizer))
    if step is None:
        return 0
    with torch.no_grad():
        step(shell)
    tensors = [leaf for leaf in tree_leaves(list(shell.state.values())) if _is_tensor(leaf)]
    collected = TensorCollector()
    collected.tree(tensors)
    return Layout.of(collected.tensors).nbytes


def _bare_step(optimizer: type[Optimizer]) -> Callable[[Optimizer], object] | None:
    """The class's own arithmetic, and nothing around it that hears of a step; None if unknown.

    Torch wraps it for hooks, global ones too, and for profilers. What has taken its place since,
    as a mock does, is not called. Nor is an override that calls the step of its base class: it may
    count or print, and that one makes the state. An instance's step is none of this: a scheduler
    puts one there that is bound to the optimizer itself (`LRScheduler`'s
    `patch_track_step_called`), and would step the run's weights.
    """
    if not getattr(optimizer.step, "hooked", False):
        return None
    for kind in optimizer.__mro__:
        step: Any = inspect.unwrap(vars(kind).get("step", kind))
        if step is kind:
            continue
        if not inspect.isfunction(step):
            return None
        if "super" not in step.__code__.co_names:
            return step
    return None


def _without_contents(parameter: Tensor) -> nn.Parameter:
    # Of a sharded parameter this rank keeps the state of its shard.
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # pyright: ignore
    stand_in = nn.Parameter(torch.empty_like(local, device="meta"))
    stand_in.grad = torch.empty_like(stand_in)
    return stand_in


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of a LightningOptimizer."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _numbers(optimizer: Optimizer) -> dict[int, int]:
    return {id(parameter): number for number, parameter in enumerate(_parameters(optimizer))}
