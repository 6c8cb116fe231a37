"""A Hopper GPU on the host: the package's own path from call to launch, with kernels that run in the emulator.

`install()` turns a process into a machine on which CPU tensors are computed by the kernels: their generated sources,
compiled for the host, under a stand-in for the CUDA driver (emulator/driver.cc). The planner, the generator and the
runtime are the package's own. What the emulator cannot tell: registers, speed, and whether it has the hardware right.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fake_cuda
from flash_attn_3 import backward_launch, codegen, compiler, launch, runtime, runtime_build
from flash_attn_3.backward_config import BackwardConfig
from flash_attn_3.config import KernelConfig

#: Enough that tiles are shared out unevenly, and so few that CTAs take several.
NUM_SMS = 3

_FOLDER = Path(__file__).resolve().parent
_KERNELS = _FOLDER.parent / "csrc" / "kernels"
_EMULATOR = _FOLDER / "emulator"
#: A fortified longjmp refuses to change stacks.
_FLAGS = ("-std=c++17", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-fPIC", "-w", "-Wno-psabi")
#: Kernels tell of their loads and stores. -O2 takes longer to compile than -O1, and they run no faster.
_KERNEL_FLAGS = ("-O1", "-fsanitize=thread")
_MACHINE_FLAGS = ("-O3",)
_DTYPES = {torch.float16: fake_cuda.FP16, torch.bfloat16: fake_cuda.BF16, torch.float32: fake_cuda.FP32}
_DTYPES[torch.int32] = fake_cuda.INT32


@dataclasses.dataclass(frozen=True)
class HostKernel:
    """In the place of a `compiler.CompiledKernel`; ``cubin`` holds the path of the library."""

    config: KernelConfig
    cubin: Path

    @property
    def symbol(self) -> str:
        return self.config.name

    @property
    def num_threads(self) -> int:
        return self.config.num_threads

    @property
    def smem_bytes(self) -> int:
        return self.config.smem_bytes

    @property
    def meta(self) -> dict[str, object]:
        return {}


@dataclasses.dataclass(frozen=True)
class SourceChange:
    """A defect: `old` becomes `new` wherever it stands in a header, a path below csrc/kernels."""

    header: str
    old: str
    new: str

    def apply(self, tree: Path) -> Path:
        """A copy of the tree with the change."""
        text = (tree / self.header).read_text()
        if self.old not in text:
            raise ValueError(f"old: {self.old!r} does not occur in {self.header}")
        changed = Path(tempfile.mkdtemp(dir=tree.parent))
        shutil.copytree(tree, changed, dirs_exist_ok=True)
        (changed / self.header).write_text(text.replace(self.old, self.new))
        return changed


class Emulator:
    """The machine of this process."""

    def __init__(self, folder: Path, num_sms: int):
        self.folder = folder
        self._driver = ctypes.CDLL(str(_driver(folder)), mode=ctypes.RTLD_GLOBAL)
        self._driver.emulator_configure.argtypes = (ctypes.c_uint, ctypes.c_uint64)
        self._driver.emulator_watch.argtypes = (*[ctypes.POINTER(ctypes.c_size_t)] * 2, ctypes.c_size_t)
        self.num_sms = num_sms
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Choose the order of events of the next launch; the ones after it get the next seeds."""
        self._driver.emulator_configure(self.num_sms, seed)

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Hold accesses of the next launches to these against each other."""
        ranges = [_memory_range(tensor) for tensor in tensors]
        array = ctypes.c_size_t * len(ranges)
        self._driver.emulator_watch(array(*(r[0] for r in ranges)), array(*(r[1] for r in ranges)), len(ranges))

    @functools.cache  # noqa: B019, the machine lives as long as its process
    def kernel(self, config: KernelConfig, change: SourceChange | None = None) -> HostKernel:
        """The kernel of a configuration, compiled or taken from `folder`."""
        return build(self.folder, config, change)


class EmulatedMachine:
    """A process that is a machine with an emulated GPU.

    `folder` keeps what is compiled, and may be shared; `configs` are compiled side by side at once.
    """

    def __init__(self, folder: Path, num_sms: int = NUM_SMS, configs: Iterable[KernelConfig] = ()):
        folder.mkdir(exist_ok=True)
        order = list(dict.fromkeys(configs))
        random.Random(os.getpid()).shuffle(order)  # another process that shares the folder begins with others
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(functools.partial(build, folder), order))
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start, (folder, num_sms, fake_cuda.runtime_library())
        )

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(emulator, *arguments)`` in that process; exceptions come back."""
        return self._pool.submit(_call_with_emulator, function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


_machine: Emulator | None = None


def _start(folder: Path, num_sms: int, runtime_library: Path) -> None:
    global _machine
    torch.set_num_threads(1)
    _machine = install(folder, num_sms, runtime_library)


def _call_with_emulator(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(_machine, *arguments)


def install(folder: Path, num_sms: int = NUM_SMS, runtime_library: Path | None = None) -> Emulator:
    """Let the kernels compute what the package would compute by its model of them. For a process of its own."""
    emulator = Emulator(folder, num_sms)
    library = runtime.load_library(runtime_library or fake_cuda.runtime_library())
    library = dataclasses.replace(
        library,
        forward_launcher=_with_cuda_tensors(emulator, library.forward_launcher),
        backward_launcher=_with_cuda_tensors(emulator, library.backward_launcher),
    )
    runtime._library = lambda: library
    compiler.get_kernel = emulator.kernel
    launch.device_sms = backward_launch.device_sms = lambda device: num_sms
    launch._cpu_forward = launch._cuda_forward
    launch._new_promoted_out = _new_promoted_out
    backward_launch._cpu_backward = backward_launch.cuda_backward
    # Nobody reads the values of index tensors on a GPU.
    launch._checked = backward_launch._checked = lambda call, run: run
    return emulator


def _new_promoted_out(plan, device):
    if plan.promoted_floats == 0:
        return None
    return functools.partial(torch.full, (plan.promoted_floats,), torch.nan)


def _with_cuda_tensors(
    emulator: Emulator, launcher: Callable[..., Callable[..., None]]
) -> Callable[..., Callable[..., None]]:
    def make(*options: Any) -> Callable[..., None]:
        launch = launcher(*options)

        def launch_watched(*tensors: torch.Tensor | None) -> None:
            emulator.watch(tensor for tensor in tensors if tensor is not None and tensor.numel() > 0)
            launch(*map(_as_cuda, tensors))

        return launch_watched

    return make


def _memory_range(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address, the latter excluded, of a tensor that is not empty."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _as_cuda(tensor: torch.Tensor | None) -> Any:
    """The same memory, as if it lay on a CUDA device."""
    if tensor is None:
        return None
    return fake_cuda.tensor(tensor.shape, _DTYPES[tensor.dtype], strides=tensor.stride(), address=tensor.data_ptr())


def build(folder: Path, config: KernelConfig, change: SourceChange | None = None) -> HostKernel:
    """Compile a configuration's generated source for the host, unless `folder` has it."""
    source = '#include "entry.h"\n' + codegen.render(config) + _entries(config)
    key = hashlib.sha256((source + _digest() + repr(change)).encode()).hexdigest()[:16]
    library = folder / f"{config.name}-{key}.so"
    cubin = library.with_suffix(".path")
    if not cubin.exists():
        tree = _source_tree(folder) if change is None else change.apply(_source_tree(folder))
        unit = folder / f"{config.name}-{os.getpid()}.cc"
        unit.write_text(source)
        temporary = library.with_suffix(f".{os.getpid()}")
        includes = [f"-I{tree}", f"-I{_EMULATOR}", f"-I{_EMULATOR / 'include'}"]
        # In two steps: linked with the flags of the kernel, it would bring the compiler's own check along.
        compiled = unit.with_suffix(".o")
        _run_compiler([*_KERNEL_FLAGS, *includes, "-c", unit], compiled)
        _run_compiler(["-shared", compiled], temporary)
        compiled.unlink()
        temporary.rename(library)
        path = temporary.with_name(f"{temporary.name}.tmp")
        path.write_bytes(os.fsencode(library) + b"\0")
        path.rename(cubin)
    return HostKernel(config, cubin)


def _source_tree(folder: Path) -> Path:
    """The kernels' headers with the emulator's instructions in the place of the GPU's."""
    tree = folder / f"kernels-{_digest()}"
    if not tree.exists():
        temporary = Path(tempfile.mkdtemp(dir=folder))
        shutil.copytree(_KERNELS, temporary, dirs_exist_ok=True)
        shutil.copyfile(_EMULATOR / "ptx.cuh", temporary / "core" / "ptx.cuh")
        _publish(temporary, tree)
    return tree


def _driver(folder: Path) -> Path:
    library = folder / f"driver-{_digest()}" / "libcuda.so.1"
    if not library.exists():
        temporary = Path(tempfile.mkdtemp(dir=folder))
        sources = sorted(_EMULATOR.glob("*.cc"))
        flags = [*_MACHINE_FLAGS, "-shared", f"-Wl,-soname,{library.name}"]
        _run_compiler([*flags, *sources, "-ldl"], temporary / library.name)
        _publish(temporary, library.parent)
    return library


def _publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; another process may have been faster, with the same contents."""
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)


@functools.cache
def _digest() -> str:
    """Of all sources but the generated ones."""
    files = [path for root in (_KERNELS, _EMULATOR) for path in sorted(root.rglob("*")) if path.is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _entries(config: KernelConfig) -> str:
    if isinstance(config, BackwardConfig):
        symbols = (config.preprocess_symbol, config.name, config.postprocess_symbol)
        return "".join(f"\nEMULATED_KERNEL({symbol}, fa::BackwardParams)" for symbol in symbols)
    return f"\nEMULATED_KERNEL({config.name}, fa::ForwardParams)"


def _run_compiler(arguments: Sequence[str | Path], result: Path) -> None:
    include = f"-isystem{runtime_build.find_cuda_include()}"
    command = [*runtime_build.find_cxx_compiler(), *_FLAGS, include, *map(str, arguments), "-o", str(result)]
    subprocess.run(command, check=True)
