"""A stub compiler, headers and a cache in a temporary folder: everything the compiler module reads, to be bent."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from flash_attn_3 import compiler, toolchain
from flash_attn_3.config import Dtype, ForwardConfig, Mask, Score, SeqLayout

HOPPER = Path(toolchain.__file__).resolve().parents[1]

CONFIG = ForwardConfig(
    Dtype.BF16, 128, 128, Mask.CAUSAL, SeqLayout.DENSE, Score.SCALED, block_m=128, block_n=128, num_stages=2
)

RELEASE = "Cuda compilation tools, release 13.0, V13.0.88"
#: What the stub does when it is told to compile: what nvcc does, as far as the package can tell.
COMPILES = """
echo 'ptxas info    : Compiling entry function' >&2
echo '    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads' >&2
echo 'ptxas info    : Used 168 registers, used 16 barriers' >&2
printf 'cubin of '  > kernel.cubin
cat kernel.cu >> kernel.cubin
"""


@dataclasses.dataclass
class Workbench:
    """The folders of one test, with the environment pointing at them."""

    root: Path
    nvcc: Path
    cache: Path
    kernels: Path
    cutlass: Path

    def write_compiler(self, body: str = COMPILES, version: str = RELEASE) -> None:
        """Replace the stub compiler; `body` runs in the entry's temporary folder."""
        write_nvcc(self.nvcc, f"echo run >> {self.root}/runs\n{body}", version)

    def num_compilations(self) -> int:
        runs = self.root / "runs"
        return len(runs.read_text().splitlines()) if runs.exists() else 0

    def environment(self) -> dict[str, str]:
        """For another Python process that shall see the same folders."""
        return {**os.environ, "PYTHONPATH": str(HOPPER)}

    def forget(self) -> None:
        """Make this process as ignorant as a new one."""
        toolchain.reset()
        compiler._headers_digest.cache_clear()
        compiler._loaded.clear()


def write_nvcc(path: Path, body: str = "exit 1", version: str = RELEASE) -> Path:
    """A stub nvcc: a shell script that answers ``--version`` and else runs `body`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n{body}')
    path.chmod(0o755)
    return path


def write_cutlass(root: Path, version: str = "4 2 0") -> Path:
    """The two headers by which CUTLASS is known."""
    header = root / "include" / "cute" / "arch" / "mma_sm90_gmma.hpp"
    header.parent.mkdir(parents=True)
    header.touch()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split(), strict=True)
    (root / "include" / "cutlass").mkdir()
    (root / "include" / "cutlass" / "version.h").write_text("".join(f"#define CUTLASS_{k} {v}\n" for k, v in parts))
    return root


@pytest.fixture
def workbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A `Workbench` with a stub compiler that works, a cache that does not exist yet, and no prebuilt kernels."""
    kernels = tmp_path / "csrc" / "kernels"
    for header in ("params.h", "core/traits.cuh", "fwd/kernel.cuh", "bwd/kernel.cuh"):
        (kernels / header).parent.mkdir(parents=True, exist_ok=True)
        (kernels / header).write_text(f"// {header}\n")
    bench = Workbench(
        root=tmp_path,
        nvcc=tmp_path / "toolkit" / "nvcc",
        cache=tmp_path / "cache",
        kernels=kernels,
        cutlass=write_cutlass(tmp_path / "cutlass"),
    )
    bench.write_compiler()
    monkeypatch.setenv("FLASH_ATTN_3_NVCC", str(bench.nvcc))
    monkeypatch.setenv("FLASH_ATTN_3_CACHE", str(bench.cache))
    monkeypatch.setenv("CUTLASS_PATH", str(bench.cutlass))
    monkeypatch.delenv("FLASH_ATTN_3_JIT", raising=False)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(toolchain, "_SOURCE_TREE", tmp_path)
    monkeypatch.setattr(compiler, "PREBUILT_DIR", tmp_path / "prebuilt")
    bench.forget()
    yield bench
    bench.forget()
