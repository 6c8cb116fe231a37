"""The CPU back end: what every public function runs on CPU tensors."""

from .cpu.forward import forward

__all__ = ["forward"]
