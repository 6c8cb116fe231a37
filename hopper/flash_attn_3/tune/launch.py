"""How the tuner launches a kernel: all that it knows of the runtime's calling convention."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import runtime
from ..cache import CompiledKernel
from ..heuristics import ForwardPlan
from ..problem import ForwardProblem, ScoreScales


def prepare(
    kernel: CompiledKernel,
    problem: ForwardProblem,
    plan: ForwardPlan,
    softcap: float,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> Callable[[], None]:
    """A call that enqueues the kernel on q, k, v and writes out and lse, the five `tensors`."""
    handle = runtime.load_kernel(kernel)
    scales = ScoreScales.of(problem.head_dim**-0.5, softcap)
    arguments = (
        *tensors,
        *(None, None, None, None),  # cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        plan.num_ctas,
        plan.num_value_passes,
        plan.heads_per_section,
        scales.score_scale,
        scales.exp2_scale,
        problem.mask.window_left,
        problem.mask.window_right,
        problem.mask.attention_chunk,
    )

    def launch() -> None:
        runtime.forward(handle, *arguments)

    return launch
