"""How the tuner launches a kernel: as the package does, but with tensors and a plan of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..cache import CompiledKernel
from ..heuristics import ForwardPlan
from ..launch import cuda_forward
from ..problem import ForwardProblem


def prepare(
    kernel: CompiledKernel,
    problem: ForwardProblem,
    plan: ForwardPlan,
    softcap: float,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> Callable[[], None]:
    """A call that enqueues the kernel on q, k, v and writes out and lse, the five `tensors`.

    Args:
        cu_seqlens: of queries and keys, where they are packed.

    Raises:
        ValueError: the plan needs scratch; sequences that long are not tuned.
    """
    if plan.promoted_floats > 0:
        raise ValueError(f"max_seqlen_k={problem.max_seqlen_k} is too long to be tuned; its kernels need scratch")
    launch = cuda_forward(kernel, problem, plan, problem.head_dim**-0.5, softcap)
    # seqused_q, seqused_k, promoted_out
    return functools.partial(launch, *tensors, *cu_seqlens, *(None,) * 3)
