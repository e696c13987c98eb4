"""What a module of experts is made of, and how its products follow from each other.

Known are the experts of transformers from version 5 on, which all keep to one interface
(`transformers.integrations.moe.use_experts_implementation`), and those of torchtitan's
`GroupedExperts`. What is known is only what stands between the products: what multiplies is handed
in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp.kernels.grouped.groups import Groups

Product = Callable[[Tensor, Tensor, Groups], Tensor]
"""Of tokens [rows, in_features] sorted by expert, and weights [experts, out_features, in_features]:
[rows, out_features]."""


@dataclass(frozen=True, kw_only=True)
class ExpertsKind:
    """One way to write a module of experts."""

    name: str
    """Whose it is."""

    recognises: Callable[[nn.Module], bool]
    """Whether a module is written so."""

    weights: Callable[[Any], tuple[Tensor, ...]]
    """Its Parameters that multiply, each [experts, ...]; the last is that of the way back."""

    features: Callable[[Any], tuple[int, int]]
    """Its features outside and inside of an expert."""

    rows: Callable[..., int]
    """Rows of its products: the arguments of its own forward."""

    forward: Callable[..., Tensor]
    """Its forward: the module, a `Product`, and the arguments of its own forward."""

    takes_shards: bool = False
    """Whether it is called with the tokens of its rank's experts where these are sharded."""

    by_rule: bool = False
    """Whether its look alone does not say enough: a rule must name it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is itself."""
        return _named, (self.name,)


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """How large the experts of a module are."""

    experts: int
    in_features: int
    """Of the tokens."""

    out_features: int
    """Inside of an expert."""


def kind_of(module: nn.Module) -> ExpertsKind | None:
    """How a module of experts is written, converted or not; None for all other modules."""
    known = vars(module).get("kind")
    if isinstance(known, ExpertsKind):
        return known
    return next((kind for kind in KINDS if kind.recognises(module)), None)


def _named(name: str) -> ExpertsKind:
    return next(kind for kind in KINDS if kind.name == name)


def shape_of(module: nn.Module, kind: ExpertsKind) -> ExpertsShape:
    """How large its experts are."""
    outside, inside = kind.features(module)
    experts = kind.weights(module)[-1].shape[0]
    return ExpertsShape(experts=experts, in_features=outside, out_features=inside)


def experts_per_token(module: nn.Module) -> int | None:
    """How many experts see a token, where the module's configuration says so."""
    config = getattr(module, "config", None)
    for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "top_k"):
        for owner in (config, module):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


# -- transformers ------------------------------------------------------------------------------


def _is_of_transformers(module: nn.Module) -> bool:
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts", "_is_expert_parallel")
    if not all(hasattr(module, flag) for flag in flags) or not hasattr(module, "_apply_gate"):
        return False
    up = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    return _three_dimensional(module, up, "down_proj")


def _weights_of_transformers(module: Any) -> tuple[Tensor, ...]:
    return (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj


def _features_of_transformers(module: Any) -> tuple[int, int]:
    down = module.down_proj.shape
    return (down[2], down[1]) if module.is_transposed else (down[1], down[2])


def _forward_of_transformers(
    module: Any,
    multiply: Product,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """As `transformers.integrations.moe.grouped_mm_experts_forward`, products aside."""
    tokens, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    groups = Groups.of_sorted(ids, module.num_experts)
    up, down = _weights_of_transformers(module)
    biases = None, None
    if module.has_bias:
        biases = (
            (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias),
            (module.down_proj_bias),
        )

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = multiply(x, weight.transpose(1, 2) if module.is_transposed else weight, groups)
        return output if bias is None else output + groups.per_row(bias).to(output.dtype)

    x = linear(hidden_states.index_select(0, order // top_k), up, biases[0])
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = linear(x, down, biases[1])
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(1)
    place = torch.empty_like(order)
    place = place.scatter(0, order, torch.arange(order.shape[0], device=order.device))
    mixed = x.index_select(0, place).view(tokens, top_k, x.shape[1]).sum(dim=1)
    return mixed.to(hidden_states.dtype)


# -- torchtitan --------------------------------------------------------------------------------


def _is_of_torchtitan(module: nn.Module) -> bool:
    if not _three_dimensional(module, "w1", "w2", "w3"):
        return False
    w1, w2, w3 = (module._parameters[name] for name in ("w1", "w2", "w3"))
    if w1 is None or w2 is None or w3 is None or w1.shape != w3.shape:
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)
    fits = w2.shape == (w1.shape[0], w1.shape[2], w1.shape[1])
    return fits and arguments == ["self", "x", "num_tokens_per_expert"]


def _forward_of_torchtitan(
    module: Any, multiply: Product, x: Tensor, num_tokens_per_expert: Tensor
) -> Tensor:
    """As torchtitan's `GroupedExperts`: tokens are sorted already, their weights applied later."""
    groups = Groups.of_counts(num_tokens_per_expert, x.shape[0])
    hidden = F.silu(multiply(x, module.w1, groups)) * multiply(x, module.w3, groups)
    return multiply(hidden, module.w2, groups).to(x.dtype)


def _three_dimensional(module: nn.Module, *names: str) -> bool:
    parameters = [module._parameters.get(name) for name in names]
    return all(each is not None and each.dim() == 3 for each in parameters)


KINDS = (
    ExpertsKind(
        name="transformers",
        recognises=_is_of_transformers,
        weights=_weights_of_transformers,
        features=_features_of_transformers,
        rows=lambda hidden_states, top_k_index, top_k_weights: top_k_index.numel(),
        forward=_forward_of_transformers,
    ),
    ExpertsKind(
        name="torchtitan",
        recognises=_is_of_torchtitan,
        weights=lambda module: (module.w1, module.w3, module.w2),
        features=lambda module: (module.w2.shape[1], module.w2.shape[2]),
        rows=lambda x, num_tokens_per_expert: x.shape[0],
        forward=_forward_of_torchtitan,
        takes_shards=True,
        by_rule=True,
    ),
)
