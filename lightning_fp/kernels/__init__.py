"""How a linear layer is multiplied: one file per engine, one small protocol."""

from typing import TYPE_CHECKING

from lightning_fp._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fp.kernels.base import Kernel, KernelMemory
    from lightning_fp.kernels.block import BlockKernel
    from lightning_fp.kernels.high_precision import HighPrecisionKernel
    from lightning_fp.kernels.memory import OperandMemory
    from lightning_fp.kernels.mx import MX_EMULATION, TorchaoMXKernel
    from lightning_fp.kernels.native import NativeKernel
    from lightning_fp.kernels.simulated import SimulatedKernel
    from lightning_fp.kernels.simulated_attention import SimulatedAttention
    from lightning_fp.kernels.torchao import TorchaoKernel
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    # protocol
    "Kernel",
    "KernelMemory",
    "OperandMemory",
    # engines
    "MX_EMULATION",
    "BlockKernel",
    "HighPrecisionKernel",
    "NativeKernel",
    "SimulatedAttention",
    "SimulatedKernel",
    "TorchaoKernel",
    "TorchaoMXKernel",
]
