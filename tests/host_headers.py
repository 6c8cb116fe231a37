"""The kernels' headers on the host: the shims in this folder include them, and are compiled by the C++ compiler."""

import atexit
import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import pytest

from flash_attn_3 import runtime_build

_FOLDER = Path(__file__).resolve().parent
_KERNELS = _FOLDER.parent / "csrc" / "kernels"
#: Signed overflow, which the device would let pass, aborts. A fortified longjmp refuses to change stacks.
_FLAGS = ("-std=c++17", "-O1", "-ftrapv", "-U_FORTIFY_SOURCE", "-shared", "-Wl,-z,defs", "-fPIC")


@functools.cache
def build(*sources: str, includes: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """The library of ``tests/<source>``, built once per process; skips the test where it cannot be built."""
    try:
        compiler, cuda = runtime_build.find_cxx_compiler(), runtime_build.find_cuda_include()
    except runtime_build.RuntimeBuildError as error:
        pytest.skip(f"needs a C++ compiler and cuda.h: {error}")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    library = Path(folder.name) / "shim.so"
    command = [
        *compiler,
        *_FLAGS,
        f"-I{_KERNELS}",
        *(f"-isystem{folder}" for folder in (*includes, cuda)),
        *(str(_FOLDER / source) for source in sources),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def build_scheduler() -> ctypes.CDLL:
    """The library of ``tests/scheduler_shim.cc``, which runs the scheduler in the emulator; as `build`."""
    machine = sorted(path.name for path in (_FOLDER / "emulator").glob("*.cc") if path.name != "driver.cc")
    return build("scheduler_shim.cc", *(f"emulator/{name}" for name in machine))
