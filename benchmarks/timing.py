"""Timing on a GPU: medians from a cold L2 cache, versions taking turns."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: Turns that each version has in a round, and launches in a turn. A turn takes a few milliseconds, so that all versions
#: meet the same clocks: the card lowers them within tenths of a second when it reaches its power limit.
TURNS = 12
LAUNCHES = 5
#: Overwritten before each launch, so that none finds its operands in the 50 MB L2 cache.
FLUSH_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of the rounds' launches, in milliseconds."""

    rounds_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.mean(self.rounds_ms)

    @property
    def spread(self) -> float:
        """Distance between the slowest and the fastest round, relative to their mean."""
        return (max(self.rounds_ms) - min(self.rounds_ms)) / self.ms


def time_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int = 2) -> dict[str, Timing]:
    """Measure each call in `rounds` rounds of many short turns, in an order drawn anew for each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        _time_launches(call, flush)
    measured: dict[str, list[float]] = {name: [] for name in calls}
    draw = random.Random(0)
    for _ in range(rounds):
        launches: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name in draw.sample(list(calls), len(calls)):
                launches[name] += _time_launches(calls[name], flush)
        for name, times in launches.items():
            measured[name].append(statistics.median(times))
    return {name: Timing(tuple(rounds_ms)) for name, rounds_ms in measured.items()}


def _time_launches(call: Callable[[], object], flush: torch.Tensor) -> list[float]:
    """Milliseconds of each launch of one turn. They are queued together, so that the device waits for no host."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(LAUNCHES)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


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
