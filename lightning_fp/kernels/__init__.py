"""How a linear layer is multiplied: one file per engine, one small protocol."""

from lightning_fp.kernels.base import Kernel
from lightning_fp.kernels.block import BlockKernel
from lightning_fp.kernels.high_precision import HighPrecisionKernel
from lightning_fp.kernels.memory import OperandMemory
from lightning_fp.kernels.mx import MX_EMULATION, TorchaoMXKernel
from lightning_fp.kernels.native import NativeKernel
from lightning_fp.kernels.simulated import SimulatedKernel
from lightning_fp.kernels.torchao import TorchaoKernel

__all__ = [
    # protocol
    "Kernel",
    "OperandMemory",
    # engines
    "MX_EMULATION",
    "BlockKernel",
    "HighPrecisionKernel",
    "NativeKernel",
    "SimulatedKernel",
    "TorchaoKernel",
    "TorchaoMXKernel",
]
