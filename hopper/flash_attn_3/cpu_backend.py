"""The CPU back end: what every public function runs on CPU tensors."""

from .cpu.backward import BackwardTensors, backward
from .cpu.forward import forward

__all__ = ["BackwardTensors", "backward", "forward"]
