"""Finds what compiling a kernel takes: nvcc, the CUTLASS headers and the package's own device headers.

Nothing here is on the hot path; each answer is looked up once per process, so a changed environment variable
is seen by new processes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import CompilerNotFoundError, HeadersNotFoundError

#: Oldest nvcc that compiles these kernels. CUTLASS 4 asks for CUDA 12.3 or newer on Hopper.
MIN_NVCC = (12, 3)
#: The PyPI packages that together are a compiler, and a file that shows each one is there (below nvidia/cu13).
PYPI_COMPILER_PARTS = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "include/cuda_runtime.h",
    "nvidia-cuda-cccl": "include/cccl/cuda/std/cstdint",
}
#: The parts must be of one release; this is the one PyTorch's CUDA 13 wheels are built with.
PYPI_RELEASE = (13, 0)

_CUTLASS_PROBE = "cute/arch/mma_sm90_gmma.hpp"
_KERNELS_PROBE = "params.h"
_HOST_COMPILERS = ("gcc", "g++", "clang++", "c++")
_PACKAGE_DIR = Path(__file__).resolve().parent
_SOURCE_TREE = _PACKAGE_DIR.parents[1]


@dataclasses.dataclass(frozen=True)
class Compiler:
    """An nvcc that works.

    Attributes:
        nvcc: its path.
        version: what `nvcc --version` prints, which names the exact build.
        release: (major, minor).
        host_compiler: what nvcc must be told to preprocess with, or None when it finds gcc by itself.
    """

    nvcc: Path
    version: str
    release: tuple[int, int]
    host_compiler: str | None = None


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """All that a compilation reads beside the generated source."""

    compiler: Compiler
    cutlass_include: Path
    cutlass_version: str
    kernels: Path


@functools.lru_cache(maxsize=1)
def find_toolchain() -> Toolchain:
    """Everything needed to compile.

    Raises:
        CompilerNotFoundError: no usable nvcc.
        HeadersNotFoundError: CUTLASS or the kernel headers are missing.
    """
    cutlass = find_cutlass()
    return Toolchain(find_compiler(), cutlass, cutlass_version(cutlass), find_kernel_headers())


# -- compiler --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def find_compiler() -> Compiler:
    """The nvcc to use: FLASH_ATTN_3_NVCC, else the first usable one in CUDA_HOME, CUDA_PATH, PATH and from PyPI.

    An nvcc that was named explicitly is used or refused, never passed over.

    Raises:
        CompilerNotFoundError: naming every place that was looked at and why it did not serve.
    """
    explicit = os.environ.get("FLASH_ATTN_3_NVCC")
    if explicit:
        try:
            return _inspect(Path(explicit))
        except CompilerNotFoundError as error:
            raise CompilerNotFoundError(f"FLASH_ATTN_3_NVCC={explicit} cannot be used: {error}") from error
    refused = []
    for origin, nvcc in _candidates():
        try:
            return _inspect(nvcc)
        except CompilerNotFoundError as error:
            refused.append(f"  {origin}: {error}")
    from_pypi = _pip_install(PYPI_COMPILER_PARTS, PYPI_RELEASE)
    reasons = "\n".join(refused) or "  no nvcc in CUDA_HOME, CUDA_PATH, PATH or the installed PyPI packages"
    raise CompilerNotFoundError(
        f"no usable nvcc was found:\n{reasons}\n"
        f"Install the CUDA toolkit ({_dotted(MIN_NVCC)} or newer), or `{from_pypi}`, "
        "or set FLASH_ATTN_3_NVCC to the path of an nvcc."
    )


def _candidates() -> Iterator[tuple[str, Path]]:
    """(where it comes from, path) of each nvcc on this machine, best first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if root:
            yield f"{variable}={root}", Path(root) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield "PATH", Path(on_path)
    for root in _pypi_roots():
        nvcc = root / PYPI_COMPILER_PARTS["nvidia-cuda-nvcc"]
        if nvcc.is_file():  # torch brings some of the other parts, which is no half-installed compiler
            yield "PyPI", nvcc


def _pypi_roots() -> list[Path]:
    """The folders nvidia/cu13, ... of NVIDIA's PyPI packages, newest CUDA first."""
    spec = importlib.util.find_spec("nvidia")
    locations = [Path(location) for location in (spec.submodule_search_locations or ())] if spec else []
    roots = [root for location in locations for root in location.glob("cu[0-9]*") if root.name[2:].isdigit()]
    return sorted(roots, key=lambda root: int(root.name[2:]), reverse=True)


def _missing_pypi_parts(nvcc: Path) -> list[str]:
    """The PyPI packages that an nvcc from PyPI still lacks; empty for any other nvcc."""
    root = nvcc.parent.parent
    if root.parent.name != "nvidia":
        return []
    return [package for package, probe in PYPI_COMPILER_PARTS.items() if not (root / probe).exists()]


def _inspect(nvcc: Path) -> Compiler:
    """Run ``nvcc --version``; raise CompilerNotFoundError if it is missing, does not run, or is too old."""
    if not nvcc.is_file():
        raise CompilerNotFoundError(f"{nvcc} does not exist")
    try:
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerNotFoundError(f"`{nvcc} --version` failed: {error}") from error
    release = release_of(shown)
    if release is None:
        raise CompilerNotFoundError(f"`{nvcc} --version` names no release; it printed {shown.strip()[:200]!r}")
    if release < MIN_NVCC:
        raise CompilerNotFoundError(f"{nvcc} is release {_dotted(release)}; {_dotted(MIN_NVCC)} or newer is needed")
    missing = _missing_pypi_parts(nvcc)
    if missing:
        raise CompilerNotFoundError(f"{nvcc} is incomplete; `{_pip_install(missing, release)}`")
    return Compiler(nvcc.absolute(), shown.strip(), release, _host_compiler(nvcc))


def release_of(version: str) -> tuple[int, int] | None:
    """(major, minor) in what ``nvcc --version`` prints, or None."""
    found = re.search(r"release (\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _host_compiler(nvcc: Path) -> str | None:
    """nvcc preprocesses with gcc; name another compiler where there is no gcc."""
    if os.environ.get("NVCC_CCBIN"):
        return None
    found = next((compiler for compiler in map(shutil.which, _HOST_COMPILERS) if compiler), None)
    if found is None:
        raise CompilerNotFoundError(f"{nvcc} needs a host compiler on PATH: one of {', '.join(_HOST_COMPILERS)}")
    return None if Path(found).name == "gcc" else found


def _pip_install(packages: Iterable[str], release: tuple[int, int]) -> str:
    return " ".join(["pip install", *(f'"{package}=={_dotted(release)}.*"' for package in packages)])


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


# -- headers ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def find_cutlass() -> Path:
    """CUTLASS's include folder: CUTLASS_PATH, the submodule, the package's copy, or PyPI's nvidia-cutlass.

    Raises:
        HeadersNotFoundError: no CUTLASS, or CUTLASS_PATH names a folder that holds none.
    """
    explicit = os.environ.get("CUTLASS_PATH")
    if explicit:
        include = _cutlass_include(Path(explicit).absolute())
        if include is None:
            raise HeadersNotFoundError(f"CUTLASS_PATH={explicit} holds no CUTLASS: no {_CUTLASS_PROBE} in it")
        return include
    places = [_SOURCE_TREE / "csrc" / "cutlass", _PACKAGE_DIR / "device" / "cutlass", *_pypi_cutlass()]
    for place in places:
        include = _cutlass_include(place)
        if include is not None:
            return include
    raise HeadersNotFoundError(
        f"the CUTLASS headers were not found in {', '.join(map(str, places))}; "
        "run `git submodule update --init csrc/cutlass`, or `pip install --no-deps nvidia-cutlass==4.2.0.0`, "
        "or set CUTLASS_PATH to a CUTLASS checkout"
    )


def _cutlass_include(place: Path) -> Path | None:
    """The include folder of a checkout, or `place` itself when it is one already."""
    return next((folder for folder in (place / "include", place) if (folder / _CUTLASS_PROBE).is_file()), None)


def _pypi_cutlass() -> list[Path]:
    # find_spec only: importing cutlass_library would pull in its code generators.
    spec = importlib.util.find_spec("cutlass_library")
    return [Path(location) / "source" for location in (spec.submodule_search_locations or ())] if spec else []


def cutlass_version(include: Path) -> str:
    """E.g. ``4.2.0``, read from cutlass/version.h.

    Raises:
        HeadersNotFoundError: that header is missing or unreadable.
    """
    header = include / "cutlass" / "version.h"
    text = header.read_text() if header.is_file() else ""
    numbers = [re.search(rf"#define CUTLASS_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    if not all(numbers):
        raise HeadersNotFoundError(f"{header} does not give CUTLASS's version; is this a complete CUTLASS?")
    return ".".join(number[1] for number in numbers if number)


@functools.lru_cache(maxsize=1)
def find_kernel_headers() -> Path:
    """The folder with params.h, core/ and fwd/: the source tree's csrc/kernels, or the package's copy of it.

    Raises:
        HeadersNotFoundError: neither exists.
    """
    # The source tree goes first: an editable install may hold an older copy.
    places = [_SOURCE_TREE / "csrc" / "kernels", _PACKAGE_DIR / "device" / "kernels"]
    for place in places:
        if (place / _KERNELS_PROBE).is_file():
            return place
    raise HeadersNotFoundError(
        f"the kernel headers were not found in {' or '.join(map(str, places))}; reinstall the package"
    )


def reset() -> None:
    """Forget what was found, so that a changed environment is looked at again."""
    for lookup in (find_toolchain, find_compiler, find_cutlass, find_kernel_headers):
        lookup.cache_clear()
