"""A few small calls for compute-sanitizer, with everything but our kernels on the CPU.

    for tool in memcheck synccheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no --kernel-name kns=fwd_ \\
            python -m tests.gpu.sanitizer_subset || exit 1
    done
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable

import torch

from .cases import KERNEL_MASKS, Case
from .harness import Tensors, check, make_tensors, run

LENS_Q, LENS_K = (70, 0, 1, 200), (130, 5, 0, 200)

CASES = [
    *(
        Case(d, batch=1, seqlen_q=200, seqlen_k=333, heads_q=2, heads_kv=1, **mask.options)
        for d in (64, 128, 256)
        for mask in KERNEL_MASKS
    ),
    *(
        Case(d, lens_q=LENS_Q, lens_k=LENS_K, heads_q=2, heads_kv=1, **mask.options)
        for d in (64, 128)
        for mask in KERNEL_MASKS
    ),
    Case(40, batch=1, seqlen_q=3, seqlen_k=100, heads_q=1, heads_kv=1),
    Case(96, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1, causal=True),
    Case(192, 128, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1, causal=True),
    Case(64, 512, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1),
    Case(128, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1, softcap=15.0),
]


def on_device(tensors: Tensors, device: str) -> Tensors:
    """Copies of all tensors."""
    values = [getattr(tensors, field.name) for field in dataclasses.fields(tensors)]
    return Tensors(*(value if value is None else value.to(device) for value in values))


def run_case(case: Case, device: str = "cuda") -> None:
    """Call and check one case; the reference stays on the CPU, so that the sanitizer sees our kernel alone."""
    tensors = make_tensors(case, "cpu")
    out, lse = run(case, on_device(tensors, device))
    check(case, tensors, out.cpu(), lse.cpu())


def run_all(cases: Iterable[Case], run_case: Callable[[Case], None]) -> None:
    """Run the cases one by one, and say so."""
    for case in cases:
        run_case(case)
        torch.cuda.synchronize()
        sys.stdout.write(f"ok {case}\n")


if __name__ == "__main__":
    run_all(CASES, run_case)
