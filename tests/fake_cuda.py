"""CUDA without a GPU: tensors that claim to lie on a CUDA device, and a process with a stand-in for the driver.

The runtime never reads tensor data on the host, so descriptors with made-up addresses exercise all of it.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import ctypes
import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tvm_ffi

from flash_attn_3 import runtime_build

CPU, CUDA = 1, 2
#: DLPack's (type code, bits).
FP16, BF16, FP32, INT32, INT64 = (2, 16), (4, 16), (2, 32), (0, 32), (0, 64)

_FOLDER = Path(__file__).resolve().parent
_CSRC = _FOLDER.parent / "csrc"


@functools.cache
def runtime_library() -> Path:
    """The runtime library, built from this repository's sources once per process, whatever is installed."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return runtime_build.build(Path(folder.name) / runtime_build.LIBRARY_NAME, _CSRC)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
# The descriptors are never freed: they have no deleter, and live as long as this list.
_descriptors: list[Any] = []


class _Exporter:
    def __init__(self, managed: _DLManagedTensor):
        self._managed = managed

    def __dlpack__(self, **_: object) -> object:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._managed.dl_tensor.device_type, self._managed.dl_tensor.device_id


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * max(b, 1), initial=1))[::-1]


def tensor(
    shape: Sequence[int],
    dtype: tuple[int, int] = BF16,
    *,
    strides: Sequence[int] | None = None,
    address: int = 0x7F00_0000_0000,
    device: tuple[int, int] = (CUDA, 0),
) -> tvm_ffi.Tensor:
    """A tensor without memory. Strides are in elements, by default those of a contiguous tensor."""
    strides = contiguous_strides(shape) if strides is None else strides
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    steps = (ctypes.c_int64 * len(shape))(*strides)
    managed = _DLManagedTensor(_DLTensor(address, *device, len(shape), *dtype, 1, sizes, steps, 0), None, None)
    _descriptors.append((managed, sizes, steps))
    return tvm_ffi.from_dlpack(_Exporter(managed))


class FakeDriver:
    """The stand-in driver, inside a process that was started with it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_take_log.restype = ctypes.c_char_p
        self._library.fake_set_params_size.argtypes = (ctypes.c_size_t,)
        self._library.fake_reset()

    def fail(self, call: str, result: int) -> None:
        """Let a driver function return an error from now on."""
        self._library.fake_fail(call.encode(), result)

    def set_params_size(self, size: int) -> None:
        """What kernels loaded from now on say the size of their parameters is."""
        self._library.fake_set_params_size(size)

    def set_release(self, release: int) -> None:
        """The CUDA release that the driver says it is of, as CUDA counts them: 13000 is 13.0."""
        self._library.fake_set_driver_release(release)

    def set_capturing(self, capturing: bool) -> None:
        """Whether streams are being captured into a graph."""
        self._library.fake_set_capturing(int(capturing))

    @property
    def device(self) -> int:
        """The device whose context is current on this thread, -1 if none."""
        return self._library.fake_current_device()

    @device.setter
    def device(self, ordinal: int) -> None:
        self._library.fake_set_device(ordinal)

    def take_log(self) -> list[dict[str, Any]]:
        """The calls since the last time."""
        return [json.loads(line) for line in self._library.fake_take_log().decode().splitlines()]


class FakeMachine:
    """A process in which libcuda.so.1 is the stand-in: a machine with two Hopper GPUs."""

    def __init__(self, folder: Path):
        command = [*runtime_build.find_cxx_compiler(), "-std=c++17", "-O0", "-shared", "-fPIC"]
        command += [f"-I{_CSRC}", f"-isystem{runtime_build.find_cuda_include()}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(_FOLDER / "fake_driver.cc"), "-o", str(folder / "libcuda.so.1")], check=True)
        self._folder = folder
        self._pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(FakeDriver(), runtime_library(), *arguments)`` in that process; exceptions come back."""
        # The dynamic linker reads the variable when the process starts, which is at the first call.
        previous = os.environ.get("LD_LIBRARY_PATH")
        os.environ["LD_LIBRARY_PATH"] = f"{self._folder}:{previous}" if previous else str(self._folder)
        try:
            return self._pool.submit(_call_with_driver, function, runtime_library(), *arguments).result()
        finally:
            if previous is None:
                del os.environ["LD_LIBRARY_PATH"]
            else:
                os.environ["LD_LIBRARY_PATH"] = previous

    def close(self) -> None:
        self._pool.shutdown()


def _call_with_driver(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(FakeDriver(), *arguments)
