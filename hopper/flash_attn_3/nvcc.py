"""Runs nvcc on one generated source and reads what ptxas says about the result."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from .cache import CUBIN_FILE, SOURCE_FILE
from .errors import KernelCompileError
from .toolchain import Toolchain

#: Everything but the include folders.
FLAGS = (
    "-cubin",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-gencode",
    "arch=compute_90a,code=sm_90a",
    "-lineinfo",
    "-Xptxas",
    "-v",
)
#: nvcc reads more flags from these environment variables.
FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

# ptxas only informs when it inserts waits between tensor-core instructions (C7510 to C7519) or drops a setmaxnreg; the
# kernel still computes the right thing, at half the speed.
_SERIALISED = re.compile(r"^.*(?:wgmma\S* instructions are serialized|\(C751\d\)|setmaxnreg ignored).*$", re.MULTILINE)
_REGISTERS = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REPORT_FILE = "report.json"
_MEASURED_RUN = Path(__file__).with_name("measured_run.py")


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What a compilation cost and what ptxas made of the kernel.

    Attributes:
        compile_seconds: wall-clock time.
        compile_cpu_seconds: user and system time of nvcc and all that it started.
        compile_peak_bytes: resident memory of the largest of these processes (they run one after the other).
        registers: per thread, as the kernel is launched; setmaxnreg redistributes them later.
        stack_bytes, spill_store_bytes, spill_load_bytes: per thread. None where ptxas printed no such line.
    """

    compile_seconds: float
    compile_cpu_seconds: float
    compile_peak_bytes: int
    registers: int | None
    stack_bytes: int | None
    spill_store_bytes: int | None
    spill_load_bytes: int | None


def flags_identity() -> str:
    """The flags, from here and from the environment, as one string for the cache key."""
    return " ".join([*FLAGS, *(f"{name}={os.environ.get(name, '')}" for name in FLAG_VARIABLES)])


def command(toolchain: Toolchain) -> list[str]:
    """The command that turns kernel.cu into kernel.cubin in the current folder."""
    compiler = toolchain.compiler
    host = ["-ccbin", compiler.host_compiler] if compiler.host_compiler else []
    includes = [f"-I{toolchain.kernels}", f"-I{toolchain.cutlass_include}"]
    return [str(compiler.nvcc), *FLAGS, *host, *includes, "-o", CUBIN_FILE, SOURCE_FILE]


def compile_cubin(toolchain: Toolchain, folder: Path, name: str) -> CompileReport:
    """Compile `folder`/kernel.cu to `folder`/kernel.cubin.

    Raises:
        KernelCompileError: nvcc failed, or ptxas serialised the tensor-core instructions; carries nvcc's output.
    """
    report_file = folder / _REPORT_FILE
    measured = [sys.executable or "python3", "-I", str(_MEASURED_RUN), _REPORT_FILE, *command(toolchain)]
    run = subprocess.run(measured, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode != 0:
        shown = " ".join(command(toolchain))
        raise KernelCompileError(f"kernel {name} does not compile (exit code {run.returncode}): {shown}", run.stdout)
    if not (folder / CUBIN_FILE).is_file():
        raise KernelCompileError(f"the compiler wrote no {CUBIN_FILE} for kernel {name}", run.stdout)
    serialised = _SERIALISED.findall(run.stdout)
    if serialised:
        raise KernelCompileError(f"kernel {name}: ptxas serialised its tensor-core instructions", "\n".join(serialised))
    cost = json.loads(report_file.read_text())
    report_file.unlink()
    return CompileReport(
        compile_seconds=cost["seconds"],
        compile_cpu_seconds=cost["cpu_seconds"],
        compile_peak_bytes=cost["peak_bytes"],
        **_parse_ptxas(run.stdout),
    )


def _parse_ptxas(output: str) -> dict[str, int | None]:
    """The worst figures over the kernel and any function that was not inlined into it."""
    registers = [int(count) for count in _REGISTERS.findall(output)]
    frames = [tuple(map(int, found)) for found in _STACK.findall(output)]
    stack, stores, loads = (max(column) for column in zip(*frames, strict=True)) if frames else (None, None, None)
    return {
        "registers": max(registers, default=None),
        "stack_bytes": stack,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
    }
