"""Where FSDP2 keeps the weights of layers: the private fields of torch that we rely on.

torch has no public way to hear that a gathered weight is freed. Where a field is not there, nothing
is kept with gathered weights, every use casts its weight anew, and the log says so once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from lightning_fp.kernels.gathered_casts import GatheredCasts
from lightning_fp.layers.experts.experts import is_switchable_experts
from lightning_fp.layers.fsdp.agreement import Agreement
from lightning_fp.layers.fsdp.all_gather import FP8AllGather
from lightning_fp.layers.fsdp.member import Member
from lightning_fp.layers.linear import is_switchable_linear
from lightning_fp.layers.switchable import SwitchableLayer

log = logging.getLogger(__name__)


def keep_casts_of_gathered(model: nn.Module, layers: Iterable[SwitchableLayer]) -> None:
    """From here on layers keep the cast of a weight for as long as FSDP2 has it gathered.

    Args:
        model: as it trains, sharded or not.
        layers: those of a table.
    """
    weights: dict[nn.Module, list[Any]] = defaultdict(list)
    try:
        for owner, weight in _weights(model):
            _check(weight)
            weights[owner].append(weight)
    except AttributeError as error:
        log.warning(
            "weights that FSDP2 gathers are cast anew at each use: torch %s has not the private"
            " field that says when they are freed (%s)",
            torch.__version__,
            error,
        )
        return
    for layer in layers:
        if isinstance(layer, nn.Module) and layer in weights:
            casts = tuple(map(GatheredCasts, weights[layer]))
            if is_switchable_linear(layer):
                layer.gathered = casts[0]
            elif is_switchable_experts(layer):
                layer.gathered = casts


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Layers whose weights are sharded, each with what FSDP2 has of one of them."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in _groups(module):
            for parameter in group.fsdp_params:
                info = parameter._module_info
                names = [info.param_name, *info.shared_param_names]
                owners = [info.module, *info.shared_modules]
                for owner, name in zip(owners, names, strict=True):
                    if _multiplies(owner, name):
                        yield owner, parameter


def _multiplies(owner: nn.Module, name: str) -> bool:
    """Whether a Parameter of this name is what a layer multiplies by."""
    if is_switchable_experts(owner):
        parameter = owner._parameters.get(name)
        return any(parameter is weight for weight in owner.kind.weights(owner))
    return is_switchable_linear(owner) and name == "weight"


def gather_in_fp8(model: nn.Module, tell: Callable[[str], object]) -> None:
    """From here on FSDP2 gathers in FP8 what layers ask for in it; see `FP8AllGather`.

    A group that has an all-gather of the user's keeps it.

    Args:
        model: as it trains, sharded or not.
        tell: told a sentence where weights are read by others than their layers.
    """
    try:
        gathers = dict(_gathers(model))
    except AttributeError as error:
        log.warning(
            "FSDP2 gathers all weights as they are: torch %s has not the private fields that an"
            " all-gather in FP8 needs (%s)",
            torch.__version__,
            error,
        )
        return
    if not gathers:
        return
    for module, (gather, _) in gathers.items():
        module.set_custom_all_gather(gather)  # pyright: ignore[reportArgumentType]
    agreement = Agreement(gathers, tell)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            agreement.stand_around(module)


def _gathers(model: nn.Module) -> Iterator[tuple[FSDPModule, tuple[FP8AllGather, ProcessGroup]]]:
    """Sharded modules whose weights may be gathered in FP8, in the group of ranks that has them."""
    for module in model.modules():
        groups = _groups(module) if isinstance(module, FSDPModule) else []
        if not isinstance(module, FSDPModule) or len(groups) != 1:
            continue
        (group,) = groups
        plain = group._all_gather_comm
        if type(plain).__name__ != "DefaultAllGather" or not hasattr(
            group.mesh_info, "shard_mesh_size"
        ):
            continue  # the user's own, or nothing is sharded
        members = [_member(parameter) for parameter in group.fsdp_params]
        ranks: ProcessGroup = group._all_gather_process_group
        if ranks.size() > 1 and any(member.layer is not None for member in members):
            yield module, (FP8AllGather(plain, members), ranks)


def _member(parameter: Any) -> Member:
    for name in ("_sharded_param_data", "mp_policy", "sharded_param", "device", "_orig_size"):
        getattr(parameter, name)
    _check(parameter)
    info = parameter._module_info
    alone = info.param_name == "weight" and not info.shared_modules
    by_rows = parameter.fsdp_placement.dim == 0
    linear = info.module if alone and by_rows and is_switchable_linear(info.module) else None
    return Member(parameter, linear)


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # before torch 2.12
    return [] if group is None else [group]


def _check(weight: Any) -> None:
    for name in ("all_gather_outputs", "_unsharded_inner_tensors", "free_unsharded_param"):
        getattr(weight, name)
