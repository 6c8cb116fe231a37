"""What the compile tests read in a cubin."""

from __future__ import annotations

import pytest
from benchmarks import sass

from flash_attn_3.cache import CompiledKernel


def disassemble(kernel: CompiledKernel) -> list[str]:
    """As ``sass.disassemble``; skips the test where there is no disassembler."""
    try:
        return sass.disassemble(kernel)
    except FileNotFoundError as error:
        pytest.skip(str(error))
