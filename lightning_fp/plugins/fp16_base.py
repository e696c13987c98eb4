"""FP16 as a base precision, and bf16 in its place: of which kind can change in mid-run."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.rnn import RNNBase
from typing_extensions import override

from lightning_fp.plugins.working_copies import WorkingCopies

if TYPE_CHECKING:
    from collections.abc import Generator


class HalfMixed(Precision):
    """Autocast in 16 bits, of which kind can change while the run goes on."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float16

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast; as Lightning's, without a cache of cast weights."""
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)


class HalfTrue(Precision):
    """Everything computes in 16 bits, with copies of float32 weights."""

    dtype: torch.dtype = torch.float16

    def __init__(self) -> None:
        self.copies = WorkingCopies()
        self.module: Module | None = None

    @override
    def convert_module(self, module: Module) -> Module:
        """The module stays in float32.

        Raises:
            ValueError: for recurrent layers, which hold on to their weights.
        """
        recurrent = [name for name, child in module.named_modules() if isinstance(child, RNNBase)]
        if recurrent:
            raise ValueError(
                "base must not be '16-true' for a model with recurrent layers, which keep their"
                f" weights in places of their own (got {', '.join(recurrent[:3])}); take"
                " '16-mixed'"
            )
        self.module = module
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        """Floating-point inputs in 16 bits."""
        cast = _convert_fp_tensor
        return apply_to_collection(data, function=cast, dtype=Tensor, dst_type=self.dtype)

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """New tensors are in 16 bits, and so are the weights until `copies.take_back`."""
        before = torch.get_default_dtype()
        with ExitStack() as stack:
            if self.module is not None:
                self.copies.lend(self.module, self.dtype)
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(self.dtype)
            yield
