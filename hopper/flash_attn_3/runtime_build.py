"""Builds the runtime library `_runtime.so` from csrc/runtime with the machine's C++ compiler.

Used by the package's build, and by hand in a source tree: ``python -m flash_attn_3.runtime_build``. Needs
neither nvcc, nor torch, nor a GPU; of CUDA only the header cuda.h, from a toolkit or from PyPI's
nvidia-cuda-runtime.
"""

from __future__ import annotations

import concurrent.futures
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

LIBRARY_NAME = "_runtime.so"

_PACKAGE_DIR = Path(__file__).resolve().parent
_CSRC = _PACKAGE_DIR.parents[1] / "csrc"
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Symbols must resolve at link time: a name missing at load time would surface on the user's machine.
_LINK_FLAGS = ("-shared", "-Wl,-z,defs")


class RuntimeBuildError(RuntimeError):
    """The runtime library cannot be built; the text says what is missing, or holds the compiler's output."""


def build(library: Path | None = None, csrc: Path = _CSRC) -> Path:
    """Compile the runtime library.

    Args:
        library: the file to write (its folder is created); by default `_runtime.so` in this package's folder.
            It is replaced as a whole, so that a process that has it loaded keeps the old one.
        csrc: the folder that holds runtime/ and kernels/; by default that of the source tree.

    Returns:
        The path of the library.

    Raises:
        RuntimeBuildError: no sources, no C++ compiler, no cuda.h, no apache-tvm-ffi, or the compiler failed.
    """
    library = Path(library) if library is not None else _PACKAGE_DIR / LIBRARY_NAME
    compiler = find_cxx_compiler()
    sources = sorted((csrc / "runtime").glob("*.cc"))
    if not sources:
        raise RuntimeBuildError(f"no sources in {csrc / 'runtime'}; the runtime is built from a source tree")
    tvm_ffi_includes, tvm_ffi_library = _find_tvm_ffi()
    # -isystem: the warnings are about our code.
    includes = [f"-I{csrc}", *(f"-isystem{path}" for path in (*tvm_ffi_includes, find_cuda_include()))]

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".runtime-build-") as scratch:

        def compile_source(source: Path) -> str:
            output = f"{scratch}/{source.stem}.o"
            _run([*compiler, *_COMPILE_FLAGS, *includes, "-c", str(source), "-o", output])
            return output

        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, sources))
        linked = f"{scratch}/{LIBRARY_NAME}"
        _run([*compiler, *_LINK_FLAGS, *objects, tvm_ffi_library, "-ldl", "-o", linked])
        os.replace(linked, library)
    return library


def find_cxx_compiler() -> list[str]:
    """The C++ compiler as a command: CXX if set (it may hold flags), else c++, g++ or clang++ from PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise RuntimeBuildError(f"CXX={named[0]} is not an executable; set CXX to a C++17 compiler, or unset it")
        return named
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise RuntimeBuildError(
        f"no C++ compiler: none of {', '.join(_COMPILERS)} is on PATH. Install g++ (Debian: apt install g++), "
        "or set CXX"
    )


def find_cuda_include() -> Path:
    """The folder of cuda.h: of the CUDA toolkit, else of PyPI's nvidia-cuda-runtime."""
    candidates = list(_cuda_include_candidates())
    for folder in candidates:
        if (folder / "cuda.h").is_file():
            return folder
    looked = ", ".join(map(str, candidates)) or "no candidate folder"
    raise RuntimeBuildError(
        f"cuda.h was not found ({looked}). `pip install nvidia-cuda-runtime`, or set CUDA_HOME to a CUDA toolkit"
    )


def _cuda_include_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parents[1] / "include"
    yield Path("/usr/local/cuda/include")
    nvidia = find_spec("nvidia")
    for location in (nvidia.submodule_search_locations or ()) if nvidia else ():
        yield from sorted(Path(location).glob("cu[0-9]*/include"), reverse=True)


def _find_tvm_ffi() -> tuple[list[str], str]:
    """Include folders and library of apache-tvm-ffi."""
    try:
        from tvm_ffi import libinfo
    except ImportError as error:
        raise RuntimeBuildError(f"apache-tvm-ffi cannot be imported ({error}); `pip install apache-tvm-ffi`") from error
    includes = [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]  # one folder, when installed by pip
    return list(dict.fromkeys(includes)), libinfo.find_libtvm_ffi()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeBuildError(f"{shlex.join(command)}\nended with status {result.returncode}:\n{result.stdout}")


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeBuildError as error:
        sys.exit(f"{error}")
