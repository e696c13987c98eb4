"""Compiled regions, and how many patterns of formats each may still see.

torch.compile compiles a code object once per pattern of formats and keeps at most
`recompile_limit` graphs for it, 8 by default; after that it runs the region eagerly and says so
only in a log. Blocks of one class share their code object, and with it the limit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType

import torch._dynamo.config
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.rules import clean_named_modules

RECOMPILE_LIMIT = 64
"""Graphs per code object that setup asks dynamo for."""

Pattern = tuple[LinearFormat, ...]


@dataclass(frozen=True)
class Region:
    """One compiled module."""

    name: str
    code: CodeType
    layers: tuple[str, ...]
    """Names of the switchable layers inside, in the order of the model."""


def raise_recompile_limit() -> None:
    """Raise dynamo's limit to `RECOMPILE_LIMIT`; a higher one stays."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)


def compiled_regions(model: nn.Module, layers: Mapping[str, object]) -> list[Region]:
    """The compiled modules of `model` that hold at least one of `layers`."""
    regions: list[Region] = []
    for name, module in clean_named_modules(model):
        if not is_compiled(module):
            continue
        inner = module._orig_mod if isinstance(module, OptimizedModule) else module
        prefix = f"{name}." if name else ""
        inside = tuple(layer for layer in layers if layer == name or layer.startswith(prefix))
        code = getattr(type(inner).forward, "__code__", None)
        if inside and code is not None:
            regions.append(Region(name, code, inside))
    return regions


def is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, `module.compile()`, or a compiled LightningModule."""
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


@dataclass
class PatternBudget:
    """Counts the distinct patterns each code object has seen."""

    seen: dict[CodeType, set[Pattern]] = field(default_factory=lambda: defaultdict(set))

    @property
    def limit(self) -> int:
        """Mixed patterns per code object: half of dynamo's limit.

        Evaluation, sampled statistics, another batch shape or grad mode cost a graph each, and a
        widened write needs room too.
        """
        return torch._dynamo.config.recompile_limit // 2

    def widen(
        self,
        regions: list[Region],
        before: Mapping[str, LinearFormat],
        writes: dict[str, LinearFormat],
    ) -> dict[str, str]:
        """Make room: where a write would cost one pattern too many, write the whole region.

        Args:
            regions: the compiled regions.
            before: every layer's format now.
            writes: the formats about to be written; widened in place.

        Returns:
            The layers that were added to `writes`, with the region's name.
        """
        for region in regions:
            self.seen[region.code].add(tuple(before[layer] for layer in region.layers))
        added: dict[str, str] = {}
        for region in regions:
            pattern = tuple(writes.get(layer, before[layer]) for layer in region.layers)
            seen = self.seen[region.code]
            if pattern not in seen and len(seen) >= self.limit and len(set(pattern)) > 1:
                format = [writes[layer] for layer in region.layers if layer in writes][-1]
                for layer in region.layers:
                    if layer not in writes and before[layer] != format:
                        added[layer] = region.name
                    writes[layer] = format
                pattern = (format,) * len(region.layers)
            seen.add(pattern)
        return added
