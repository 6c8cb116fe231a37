"""Suite compile: what building kernels costs, from an empty cache. Needs a CUDA compiler, no GPU."""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from flash_attn_3 import compiler, presets
from flash_attn_3.jobs import job_count

from . import bars, machine

#: The kinds of kernels, as their names begin.
FAMILIES = ("fwd", "bwd")
_KEPT = (
    "compile_seconds",
    "compile_cpu_seconds",
    "compile_peak_bytes",
    "registers",
    "spill_store_bytes",
    "spill_load_bytes",
    "cubin_bytes",
)


def measure(
    preset: str, kernels: Sequence[str], jobs: int | None, families: Sequence[str] = FAMILIES
) -> dict[str, Any]:
    """Build the kernels of a preset, or those named, as far as they are of these families.

    Returns:
        The result file's content.
    """
    configs = presets.resolve(kernels) if kernels else presets.load(preset)
    configs = [config for config in configs if config.FAMILY in families]
    jobs = job_count(jobs)
    result = machine.describe("compile", {"preset": None if kernels else preset, "jobs": jobs})
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        built = compiler.build_many(configs, cache, jobs=jobs)
        result["wall_seconds"] = time.perf_counter() - start
    for kernel in built:
        result["rows"].append({"name": kernel.symbol, **{key: kernel.meta[key] for key in _KEPT}})
    result["compiler"] = _release(built[0].meta["nvcc_version"]) if built else None
    result["bars"] = [dataclasses.asdict(verdict) for verdict in bars.judge("compile", result["rows"])]
    print(f"{len(built)} kernels in {result['wall_seconds']:.1f} s, {jobs} at a time", file=sys.stderr)
    return result


def _release(nvcc_version: str) -> str:
    """13.0.88 out of what `nvcc --version` prints."""
    match = re.search(r"V(\d[\d.]*)", nvcc_version)
    return match[1] if match else nvcc_version
