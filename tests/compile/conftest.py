"""The compiler of the compile tests."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from flash_attn_3 import compiler, toolchain
from flash_attn_3.cache import CompiledKernel
from flash_attn_3.errors import CompilerNotFoundError


@pytest.fixture(scope="session")
def compile_kernel(tmp_path_factory) -> Callable[..., CompiledKernel]:
    """Compiles a configuration once per test run, in an empty folder: what is measured must not come from a cache."""
    try:
        toolchain.find_compiler()
    except CompilerNotFoundError as error:
        pytest.skip(f"needs nvcc: {error}")
    folder = tmp_path_factory.mktemp("kernels")
    return functools.lru_cache(lambda config: compiler.compile_one(config, folder, announce=False))
