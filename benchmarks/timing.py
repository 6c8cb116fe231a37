"""What the benchmarks measure beside attention itself: the card's speed at this moment, and a call's host time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from flash_attn_3.timing import time_in_turns


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
