"""LentWeight: the 16-bit copy of a Parameter that stands in its place for a training step.

Products see a 16-bit tensor, and the program its Parameter: what it asks of the weight itself,
gradient, `requires_grad`, a deep copy, comes from the float32 Parameter, and what it writes to the
weight goes there when the copy is taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LentWeight(nn.Parameter):
    """A copy that knows its Parameter; operators give plain tensors, as they do for Parameters."""

    master: nn.Parameter
    slots: list[tuple[dict[str, Any], str]]
    """Where it stands in for it: several places for tied weights."""
    cast: Callable[[Tensor], Tensor]
    again: LentWeight | None
    """The copy that has taken its place, where `requires_grad` was set."""
    connected: bool
    """Whether backward comes to the Parameter from it."""
    exposed: bool
    """Whether somebody holds its data, who can write without anybody noticing."""
    versions: tuple[int, int]
    """Of itself and of the Parameter, when it was last in step with it."""

    @classmethod
    def of(
        cls, master: nn.Parameter, cast: Callable[[Tensor], Tensor], *, connected: bool = False
    ) -> LentWeight:
        """A copy of a Parameter.

        Args:
            master: the float32 Parameter.
            cast: makes the 16-bit tensor, as a part of the graph.
            connected: whether it is a part of the graph also while the Parameter asks for no
                gradient, as those of a GAN's other network do: when it asks again, the copy is
                still out. Until then backward passes it by.
        """
        asks = master.requires_grad
        if connected and not asks:
            master.requires_grad_(True)
        lent: Any = cast(master).as_subclass(cls)
        master.requires_grad_(asks)
        lent.master, lent.cast, lent.slots, lent.again = master, cast, [], None
        lent.connected = asks or connected
        lent._in_step()
        return lent

    def put(self, slots: dict[str, Any], name: str) -> None:
        """Let it stand in a module's place for the Parameter."""
        self.slots.append((slots, name))
        slots[name] = self

    def write_back(self) -> None:
        """What was written to it goes to the Parameter, whose other elements stay as they are."""
        if self.again is not None:
            self.again.write_back()
            return
        own, masters = _version(self), self.master._version
        written = self.exposed or own != self.versions[0]
        # A Parameter that was written to meanwhile, by an optimizer, is the newer one.
        if written and masters == self.versions[1]:
            with torch.no_grad():
                now, before = self.detach(), self.master.detach().to(self.dtype)
                self.master.copy_(torch.where(now != before, now.float(), self.master))
        self._in_step()

    def _in_step(self) -> None:
        self.exposed = False
        self.versions = (_version(self), self.master._version)

    # -- what a program asks of its Parameter -----------------------------------------------------

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Its values, which may be written to."""
        self.exposed = True
        values: Any = Tensor.data
        return values.__get__(self)

    @data.setter
    def data(self, values: Tensor) -> None:
        with torch.no_grad():
            self.copy_(values)

    @property
    def grad(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Parameter's."""
        return self.master.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.master.grad = value

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Parameter's; where it is set, a new copy stands in its place."""
        return self.master.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> LentWeight:
        """See `requires_grad`."""
        if requires_grad == self.master.requires_grad:
            return self
        self.write_back()
        self.master.requires_grad_(requires_grad)
        self.again = LentWeight.of(self.master, self.cast)
        for slots, name in self.slots:
            if slots.get(name) is self:
                self.again.put(slots, name)
        return self.again

    @property
    def latest(self) -> LentWeight:
        """Itself, or what has taken its place."""
        return self if self.again is None else self.again.latest

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        self.write_back()
        return copy.deepcopy(self.master, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.write_back()
        return self.master.__reduce_ex__(protocol)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def masters_in_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `state_dict`: Parameters in place of their copies."""
    for name, parameter in module._parameters.items():
        if isinstance(parameter, LentWeight) and prefix + name in state:
            parameter.write_back()
            state[prefix + name] = parameter.master.detach()
