"""Kernel configuration -> cubin on disk. Ahead-of-time builds and first-use compilation are one path.

`get_kernel` looks in the process, in the package's prebuilt folder and in the user's cache, and compiles on a miss.
The cache key covers all that decides a cubin's content: the configuration, the generated text, the device headers,
the compiler, its flags and CUTLASS. Hashing happens once per kernel and process, never on the hot path.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import enum
import functools
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from . import codegen, nvcc, toolchain
from .cache import CUBIN_FILE, META_FILE, SOURCE_FILE, CompiledKernel, DamagedEntryError, EntryKey, KernelStore, digest
from .config import KernelConfig
from .errors import CacheError, CompilerNotFoundError, HeadersNotFoundError, KernelCompileError, KernelNotBuiltError
from .jobs import job_count

#: Raise this when an entry's layout or meaning changes.
SCHEMA_VERSION = 1
#: Kernels that were compiled when the package was built.
PREBUILT_DIR = Path(__file__).resolve().parent / "prebuilt"

_HEADER_SUFFIXES = {".h", ".cuh"}
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_DISK_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")
_loaded: dict[KernelConfig, CompiledKernel] = {}


def get_kernel(config: KernelConfig) -> CompiledKernel:
    """The compiled kernel of a configuration; the same object for every call in this process.

    Raises:
        KernelNotBuiltError: it has to be compiled, but FLASH_ATTN_3_JIT=0, or there is no compiler.
        KernelCompileError: the compiler rejects it.
        CacheError: the user's cache folder is unsafe, read-only, full or damaged, or there is no home to put it in.
        ValueError: FLASH_ATTN_3_JIT is neither a yes nor a no.
    """
    kernel = _loaded.get(config)
    if kernel is None:
        kernel = _loaded[config] = _find_prebuilt(config) or _find_or_compile(config)
    return kernel


def compile_one(
    config: KernelConfig, cache_dir: str | os.PathLike[str] | None = None, *, announce: bool = True
) -> CompiledKernel:
    """The kernel from a folder of kernels, compiled into it first where it is missing or damaged.

    Any number of processes may ask for the same kernel at once: one compiles, the others wait for it.

    Args:
        config: the configuration.
        cache_dir: the folder; default: the user's cache, which is refused when others can write to it.
        announce: say on stderr, once, that a kernel is being compiled.

    Raises:
        ConfigError, CompilerNotFoundError, HeadersNotFoundError, KernelCompileError, CacheError.
    """
    config.validate()
    tools = toolchain.find_toolchain()
    key = entry_key(config, tools)
    store = user_store() if cache_dir is None else _output_store(cache_dir)
    try:
        kernel = store.load(config, key)
    except DamagedEntryError:
        kernel = None
    return kernel or _compile_locked(store, config, key, tools, announce)


def build_many(
    configs: Iterable[KernelConfig],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    jobs: int | None = None,
    progress: bool = True,
) -> list[CompiledKernel]:
    """Compile kernels side by side; the first failure stops the build.

    Args:
        configs: what to build; duplicates are built once.
        cache_dir: as for `compile_one`.
        jobs: compilers at once; default: what cores, free memory and MAX_JOBS allow.
        progress: print one line per finished kernel to stderr.

    Returns:
        The kernels, in the order of `configs`.

    Raises:
        What `compile_one` raises; ValueError for a bad `jobs` or MAX_JOBS.
    """
    configs = list(dict.fromkeys(configs))
    kernels = {}
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(job_count(jobs)) as pool:
        pending = {pool.submit(compile_one, config, cache_dir, announce=False): config for config in configs}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(pending), start=1):
                kernel = kernels[pending[future]] = future.result()
                if progress:
                    elapsed = time.perf_counter() - start
                    line = f"[{done:{len(str(len(configs)))}}/{len(configs)}] {elapsed:6.1f} s  {kernel.symbol}"
                    print(line, file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if cache_dir is not None:
        _output_store(cache_dir).remove_locks()
    return [kernels[config] for config in configs]


def user_store() -> KernelStore:
    """The user's cache: FLASH_ATTN_3_CACHE, else flash_attn_3 in XDG_CACHE_HOME or ~/.cache.

    Raises:
        CacheError: that is in a home which this user does not have.
    """
    explicit = os.environ.get("FLASH_ATTN_3_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(explicit) if explicit else Path(base) / "flash_attn_3"
    try:
        return KernelStore(root.expanduser().absolute(), private=True)
    except RuntimeError as error:  # no HOME, and nothing in the system's list of users
        raise CacheError(f"there is no kernel cache folder {root} ({error}); set FLASH_ATTN_3_CACHE to one") from error


def may_compile() -> bool:
    """Whether FLASH_ATTN_3_JIT lets missing kernels be compiled at first use, as it does where it is not set.

    Raises:
        ValueError: it is neither a yes nor a no.
    """
    value = os.environ.get("FLASH_ATTN_3_JIT") or _YES[0]
    if value.lower() not in (*_YES, *_NO):
        raise ValueError(f"FLASH_ATTN_3_JIT={value!r} is not supported; it must be one of {', '.join((*_YES, *_NO))}")
    return value.lower() in _YES


def _output_store(folder: str | os.PathLike[str]) -> KernelStore:
    """A folder that a build writes and others install from; absolute, since the compiler runs in another folder."""
    return KernelStore(Path(folder).absolute(), private=False)


# -- keys ------------------------------------------------------------------------------------------------------------


def entry_key(config: KernelConfig, tools: toolchain.Toolchain | None = None) -> EntryKey:
    """The entry of a kernel; without a toolchain its `build` part is empty."""
    headers = _headers_digest(toolchain.find_kernel_headers(), config.FAMILY)
    # The text as well as the configuration: the generator may change while the fields stay as they are.
    source = _digest_of(f"schema {SCHEMA_VERSION}", config.key(), codegen.render(config), headers)
    if tools is None:
        return EntryKey(config.name, source, "")
    build = _digest_of(tools.compiler.version, nvcc.flags_identity(), f"cutlass {tools.cutlass_version}")
    return EntryKey(config.name, source, build)


@functools.lru_cache(maxsize=16)
def _headers_digest(kernels: Path, family: str) -> str:
    """Digest over name and content of the headers that a family can include: params.h, core/ and its own folder."""
    files = [kernels / "params.h", *(kernels / "core").rglob("*"), *(kernels / family).rglob("*")]
    parts = []
    for file in sorted(file for file in files if file.suffix in _HEADER_SUFFIXES):
        parts += [file.relative_to(kernels).as_posix(), digest(file.read_bytes())[1]]
    return _digest_of(*parts)


def _digest_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# -- lookup ----------------------------------------------------------------------------------------------------------


def _find_prebuilt(config: KernelConfig) -> CompiledKernel | None:
    if not PREBUILT_DIR.is_dir():
        return None
    try:
        return _output_store(PREBUILT_DIR).load_any_build(config, entry_key(config))
    except DamagedEntryError as error:
        warnings.warn(f"a kernel of the installed package is damaged and will be recompiled: {error}", stacklevel=4)
        return None


def _find_or_compile(config: KernelConfig) -> CompiledKernel:
    """From the user's cache, or compiled into it; where nothing can be compiled, any compiler's build will do."""
    store = user_store()
    reason = _why_not_compiled(store)
    if reason is None:
        return compile_one(config)
    try:
        kernel = store.load_any_build(config, entry_key(config))
    except DamagedEntryError as error:
        raise CacheError(f"damaged entry in the kernel cache, and {reason}: {error}") from error
    if kernel is None:
        raise type(reason)(
            f"kernel {config.name} is neither in the package nor in {store.root}, and {reason}\n"
            f"It is built by: python -m flash_attn_3.generate --kernel {config.name} --build"
        ) from reason
    return kernel


def _why_not_compiled(store: KernelStore) -> KernelNotBuiltError | CacheError | None:
    """What keeps a missing kernel from being compiled into a folder; None: nothing."""
    if not may_compile():
        value = os.environ["FLASH_ATTN_3_JIT"]
        return KernelNotBuiltError(f"compiling at first use is switched off (FLASH_ATTN_3_JIT={value})")
    try:
        toolchain.find_toolchain()
        store.check_writable()
    except (CompilerNotFoundError, HeadersNotFoundError, CacheError) as error:
        return error
    return None


# -- compilation -----------------------------------------------------------------------------------------------------


def _compile_locked(
    store: KernelStore, config: KernelConfig, key: EntryKey, tools: toolchain.Toolchain, announce: bool
) -> CompiledKernel:
    with store.locked(key):
        try:
            kernel = store.load(config, key)  # another process may have been faster
        except DamagedEntryError:
            kernel = None
        if kernel is not None:
            return kernel
        if announce:
            line = f"flash_attn_3: compiling {config.name} (once; kept in {store.root})"
            print(line, file=sys.stderr, flush=True)
        _build_entry(store, config, key, tools)
        try:
            kernel = store.load(config, key)
        except DamagedEntryError as error:
            raise CacheError(f"a kernel cache entry is damaged again right after it was rebuilt: {error}") from error
    if kernel is None:
        raise CacheError(f"{store.root / key.folder} vanished right after it was written")
    return kernel


def _build_entry(store: KernelStore, config: KernelConfig, key: EntryKey, tools: toolchain.Toolchain) -> None:
    with store.new_entry(key) as folder:
        store.write(folder / SOURCE_FILE, codegen.render(config))
        try:
            report = nvcc.compile_cubin(tools, folder, config.name)
        except KernelCompileError as error:
            if any(message in error.output for message in _DISK_FULL_MESSAGES):
                raise store.full(error.output.strip()) from error
            raise
        meta = _meta(config, key, tools, report, digest((folder / CUBIN_FILE).read_bytes()))
        store.write(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


def _meta(
    config: KernelConfig,
    key: EntryKey,
    tools: toolchain.Toolchain,
    report: nvcc.CompileReport,
    cubin: tuple[int, str],
) -> dict[str, object]:
    return {
        "schema": SCHEMA_VERSION,
        "family": config.FAMILY,
        "symbol": config.name,
        "num_threads": config.num_threads,
        "smem_bytes": config.smem_bytes,
        **dataclasses.asdict(report),
        "cubin_bytes": cubin[0],
        "cubin_sha256": cubin[1],
        "source_key": key.source,
        "build_key": key.build,
        "nvcc_version": tools.compiler.version,
        "flags": nvcc.flags_identity(),
        "cutlass_version": tools.cutlass_version,
        "config": {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)},
    }


def _plain(value: object) -> object:
    return value.name if isinstance(value, enum.Enum) else value
