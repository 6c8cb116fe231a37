"""The GPU tests in the emulator: torch's CUDA tensors lie in the host's memory, the kernels run as in `emulation`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import emulation


class _CudaOnHost(TorchFunctionMode):
    """Whatever is asked to lie on a CUDA device lies in the host's memory."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return arguments[0]
        arguments = tuple(
            "cpu" if isinstance(value, str) and value.startswith("cuda") else value for value in arguments
        )
        return function(*arguments, **options)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")


@contextlib.contextmanager
def emulated_cuda(folder: Path) -> Iterator[emulation.Emulator]:
    """Run the package and torch as on a machine with a Hopper GPU. `folder` keeps compiled kernels."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.cuda, "empty_cache", lambda: None))
        stack.enter_context(_CudaOnHost())
        yield emulation.install(folder)
