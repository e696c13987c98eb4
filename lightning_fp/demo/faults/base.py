"""What all faults in a model's layers share: which layers, since when, and a clock."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from lightning_fp.choices import check_at_least
from lightning_fp.layers import PrecisionMap
from lightning_fp.layers.rules import compile_pattern, no_match_message
from lightning_fp.plugins import LayerPrecision


class _HasTable(Protocol):
    @property
    def precision_map(self) -> PrecisionMap: ...


class _Removable(Protocol):
    def remove(self) -> None: ...


@dataclass(eq=False, repr=False, kw_only=True)
class Fault(L.Callback):
    """Something that goes wrong in some layers, after a step.

    Time is what a buffer of the model counts: its forwards in training. So a fault goes back with
    the model when that is restored, and does the same again when a step is replayed. The buffer is
    in the model's checkpoints, and gone after `fit`.
    """

    layers: str = field(kw_only=False)
    """A pattern over layer names, as in `FP8Precision(layers=...)`."""

    start: int = 150
    """After how many steps it begins."""

    seed: int = 0
    """Of what is random; the same at the same step of every run, in every format."""

    def __post_init__(self) -> None:
        check_at_least(0, start=self.start)
        self._pattern = compile_pattern(self.layers)
        self._owner: _HasTable | None = None
        self._now = 0
        self._undo: list[Callable[[], object]] = []

    # -- for each kind of fault -------------------------------------------------------------------

    def attach(self, name: str, layer: nn.Linear) -> None:
        """Hook this fault into a layer, with `before`, `after` and `on_gradient`."""
        raise NotImplementedError

    @property
    def age(self) -> int:
        """Steps since the fault began, 1 in the first; not positive before."""
        return self._now - self.start

    def active(self, layer: nn.Module) -> bool:
        """Whether it acts in this forward."""
        return layer.training and self.age > 0

    def format(self, name: str) -> str:
        """A layer's format now; "high" without our plugin."""
        return "high" if self._owner is None else self._owner.precision_map.formats()[name]

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed, the step and the layer's name only."""
        place = zlib.crc32(f"{self.seed} {self._now} {name}".encode())
        return torch.Generator().manual_seed(place)

    def before(self, layer: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
        """Change the layer's input while the fault acts."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (change(args[0]), *args[1:]) if self.active(module) else None

        self._keep(layer.register_forward_pre_hook(hook))

    def after(self, layer: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
        """Change the layer's output while the fault acts."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return change(output) if self.active(module) else None

        self._keep(layer.register_forward_hook(hook))

    def on_gradient(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Change a parameter's gradient; called without asking whether the fault acts."""
        self._keep(parameter.register_hook(change))

    # -- Lightning --------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hook into the layers of the module."""
        if stage == "fit":
            plugin = trainer.precision_plugin
            self.install(pl_module, plugin if isinstance(plugin, LayerPrecision) else None)

    def install(self, model: nn.Module, owner: _HasTable | None) -> None:
        """Hook into the layers of a model; in any loop.

        Args:
            model: the model.
            owner: of the table of its formats; None where there is none.

        Raises:
            ValueError: if no linear layer matches.
        """
        self._owner = owner
        self._start_clock(model)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        names = [name for name in linears if self._pattern.fullmatch(name)]
        if not names:
            raise ValueError(no_match_message(self.layers, linears))
        for name in names:
            self.attach(name, linears[name])

    def _start_clock(self, module: nn.Module) -> None:
        buffer = f"{type(self).__name__}_clock"
        module.register_buffer(buffer, torch.zeros((), dtype=torch.int64))
        depth = 0

        def tick(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Lightning's DDP enters the module for its training step, which enters it once more.
            nonlocal depth
            depth += 1
            if module.training and depth == 1:
                clock: Tensor = getattr(module, buffer)
                clock += 1
                self._now = int(clock)

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1

        self._keep(module.register_forward_pre_hook(tick))
        self._keep(module.register_forward_hook(leave, always_call=True))
        self._undo.append(lambda: delattr(module, buffer))

    def _keep(self, handle: _Removable) -> None:
        self._undo.append(handle.remove)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The module is as it was."""
        self.uninstall()

    def uninstall(self) -> None:
        """Take out of a model what `install` has put there."""
        for undo in self._undo:
            undo()
        self._undo.clear()
