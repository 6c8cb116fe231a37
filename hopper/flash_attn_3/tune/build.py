"""Compiles the candidates side by side. A kernel that does not compile, or spills, is dropped with the reason."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import compiler, toolchain
from ..cache import CompiledKernel, DamagedEntryError, KernelStore
from ..config import ForwardConfig
from ..errors import CompilerNotFoundError, HeadersNotFoundError, KernelCompileError
from ..jobs import job_count


@dataclasses.dataclass
class Built:
    """What became of the candidates.

    Attributes:
        kernels: those that can be launched, also the ones that spill.
        dropped: why a configuration is not to be measured.
        missing: those of them that were not found and could not be compiled here, so nothing is known of them.
    """

    kernels: dict[ForwardConfig, CompiledKernel] = dataclasses.field(default_factory=dict)
    dropped: dict[ForwardConfig, str] = dataclasses.field(default_factory=dict)
    missing: set[ForwardConfig] = dataclasses.field(default_factory=set)

    def add(self, other: Built) -> None:
        """Take over what became of other candidates."""
        self.kernels |= other.kernels
        self.dropped |= other.dropped
        self.missing |= other.missing


def kernel_store(folder: Path | None) -> KernelStore:
    """The folder that kernels are compiled into and loaded from; None: the user's cache."""
    return compiler.user_store() if folder is None else KernelStore(folder.absolute(), private=False)


def can_compile() -> bool:
    """Whether a missing kernel may and can be compiled here."""
    if not compiler.may_compile():
        return False
    try:
        toolchain.find_toolchain()
    except (CompilerNotFoundError, HeadersNotFoundError):
        return False
    return True


def build(configs: Sequence[ForwardConfig], folder: Path | None, jobs: int | None) -> Built:
    """Find or compile kernels, with one line on stderr for each that is done.

    Raises:
        CacheError: the folder is unsafe, read-only or full.
    """
    obtain = _compile if can_compile() else _find
    built = Built()
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(job_count(jobs)) as pool:
        pending = {pool.submit(obtain, config, folder): config for config in configs}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(pending), start=1):
                config = pending[future]
                outcome = _collect(built, config, future.result)
                elapsed = time.perf_counter() - start
                print(f"[{done}/{len(pending)}] {elapsed:6.1f} s  {config.name}{outcome}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return built


def _compile(config: ForwardConfig, folder: Path | None) -> CompiledKernel:
    return compiler.compile_one(config, folder, announce=False)


def _find(config: ForwardConfig, folder: Path | None) -> CompiledKernel:
    store = kernel_store(folder)
    kernel = store.load_any_build(config, compiler.entry_key(config))
    if kernel is None:
        raise FileNotFoundError("not among the kernels, and nothing can be compiled here")
    return kernel


def _collect(built: Built, config: ForwardConfig, result: Callable[[], CompiledKernel]) -> str:
    """Note a kernel or why there is none; returns what to add to the progress line."""
    try:
        kernel = result()
    except KernelCompileError as error:
        # From "error" on: what stands before it is a path.
        errors = re.findall(r"error.*", error.output, re.IGNORECASE)
        built.dropped[config] = f"does not compile: {(errors or str(error).splitlines())[0]:.200}"
    except (FileNotFoundError, DamagedEntryError) as error:
        built.dropped[config] = f"not built: {error}"
        built.missing.add(config)
    else:
        built.kernels[config] = kernel
        spilled = spilled_bytes(kernel)
        if spilled:
            built.dropped[config] = f"spills {spilled} bytes"
    return f"  {built.dropped[config]}" if config in built.dropped else ""


def spilled_bytes(kernel: CompiledKernel) -> int:
    """Bytes that a thread stores to and loads from its stack for want of registers."""
    return sum(int(kernel.meta.get(name) or 0) for name in ("spill_store_bytes", "spill_load_bytes"))
