"""Timing on a GPU: medians from a cold L2 cache, versions taking turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: Milliseconds of running before, and of, one measurement.
WARMUP_MS = 25
MEASURE_MS = 100


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of the rounds, in milliseconds."""

    rounds_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.mean(self.rounds_ms)

    @property
    def spread(self) -> float:
        """Distance between the slowest and the fastest round, relative to their mean."""
        return (max(self.rounds_ms) - min(self.rounds_ms)) / self.ms


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int = 2, cooldown_s: float = 0.0
) -> dict[str, Timing]:
    """Measure each call `rounds` times, in turns, so that drifting clocks meet all of them alike."""
    from triton.testing import do_bench

    measured: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(cooldown_s)
            measured[name].append(do_bench(call, warmup=WARMUP_MS, rep=MEASURE_MS, return_mode="median"))
    return {name: Timing(tuple(rounds_ms)) for name, rounds_ms in measured.items()}


def matmul_tflops(size: int = 8192) -> float:
    """TFLOP/s of a large bf16 matrix product: what this card allows at this moment."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / time_in_turns({"matmul": lambda: a @ b}, rounds=1)["matmul"].ms / 1e9


def cpu_us_per_call(call: Callable[[], object], batches: int = 30, calls_per_batch: int = 200) -> list[float]:
    """Microseconds of host time per call, one value per batch of calls.

    The device is waited for between batches only: a batch fits in the launch queue, so no call waits for a kernel.
    """
    values = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls_per_batch):
            call()
        values.append((time.perf_counter() - start) / calls_per_batch * 1e6)
    torch.cuda.synchronize()
    return values[batches // 10 :]
