"""Typed errors of the package that a caller may want to tell apart.

Wrong arguments raise Python's own ValueError and TypeError; these are for kernels and the machine.
"""

from __future__ import annotations


class KernelNotBuiltError(RuntimeError):
    """A kernel is missing and cannot be compiled here; the text names it and the command that builds it."""


class CompilerNotFoundError(KernelNotBuiltError):
    """No usable CUDA compiler (nvcc, or the host compiler that nvcc needs)."""


class HeadersNotFoundError(KernelNotBuiltError):
    """The headers that a kernel includes, CUTLASS's or the package's own, are not on this machine."""


class KernelCompileError(RuntimeError):
    """The compiler rejected a kernel, or serialised its tensor-core instructions; carries the compiler's output."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(f"{message}\n{output}" if output else message)
        self.output = output


class CacheError(RuntimeError):
    """The kernel cache folder is unsafe, closed, read-only, full, or holds a damaged entry that a rebuild did not mend.

    Also where its default place is in the home of a user who has none.
    """


class RuntimeLibraryError(RuntimeError):
    """The library that launches kernels is missing, or cannot be loaded; the text has the command that mends it."""


class UnsupportedDeviceError(RuntimeError):
    """The tensors are on a GPU that these kernels were not written for (anything but Hopper), or it has no driver."""
