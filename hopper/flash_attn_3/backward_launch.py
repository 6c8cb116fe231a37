"""What a backward signature comes down to: the tensors to allocate and a function of tensors that fills them."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable

import torch

from . import validation
from .backward_config import Accumulation
from .backward_plan import BackwardPlan, BackwardProblem, plan_backward
from .backward_validation import check_backward
from .launch import device_sms, forward_problem
from .problem import ScoreScales
from .signature import NUM_INDEX_TENSORS, BackwardSignature, TensorSpec

#: To be dropped with the first run of the GPU tests of gradients.
NOT_RUN_ON_A_GPU = (
    "the backward kernels of flash_attn_3 have run in an emulator, and have not yet run on a GPU: compare their "
    "gradients with another attention's before you rely on them"
)


@dataclasses.dataclass(frozen=True)
class BackwardLaunch:
    """One signature's backward pass, ready to run on any tensors of that signature.

    Attributes:
        new_gradients: allocate dq, dk and dv, uninitialised and contiguous.
        new_statistics: allocates scratch with two floats per query row.
        run: ``run(dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q,
            seqused_k)`` writes the statistics and those of dq, dk and dv that are not None. On CUDA devices only
            blocks of statistics with rows that exist are written.
        checks_tensors: whether ``run`` raises TypeError or ValueError for tensors of another signature.
    """

    new_gradients: tuple[Callable[[], torch.Tensor], ...]
    new_statistics: Callable[[], torch.Tensor]
    run: Callable[..., None]
    checks_tensors: bool


def prepare_backward(call: BackwardSignature) -> BackwardLaunch:
    """Judge a signature, plan it and get its kernels."""
    check_backward(call)
    forward = call.forward
    accumulation = Accumulation.ORDERED if call.deterministic else Accumulation.UNORDERED
    problem = BackwardProblem(forward_problem(forward, device_sms(forward.q.device)), accumulation)
    plan = plan_backward(problem)
    is_empty = math.prod(forward.q.shape) == 0 or math.prod(forward.k.shape) == 0
    if forward.q.device.type == "cpu":
        run, checks_tensors = _checked(call, _write_zeros if is_empty else _cpu_backward(call, problem, plan)), False
    elif is_empty:
        run, checks_tensors = _write_zeros, False
    else:
        warnings.warn(NOT_RUN_ON_A_GPU, stacklevel=1)
        run, checks_tensors = cuda_backward(call, problem, plan), True
    statistics = TensorSpec(call.statistics_shape(plan.config.block_m), torch.float32, forward.q.device)
    return BackwardLaunch(
        tuple(map(_allocator, (forward.q, forward.k, forward.v))), _allocator(statistics), run, checks_tensors
    )


def _allocator(spec: TensorSpec) -> Callable[[], torch.Tensor]:
    # Sizes one by one: torch takes half a microsecond more to read a tuple of them.
    return functools.partial(torch.empty, *spec.shape, dtype=spec.dtype, device=spec.device)


# -- what runs -------------------------------------------------------------------------------------------


def _write_zeros(dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, *index_tensors) -> None:
    """No query sees a key."""
    statistics[0].zero_()
    statistics[1].fill_(math.inf)
    for gradient in (dq, dk, dv):
        if gradient is not None:
            gradient.zero_()


def _checked(call: BackwardSignature, run: Callable[..., None]) -> Callable[..., None]:
    """``run`` after a look at the index tensors' values, also where a wrong max_seqlen says that there is nothing."""
    longest = (call.forward.max_seqlen_q, call.forward.max_seqlen_k)

    def checked(dout, q, k, *others: torch.Tensor | None) -> None:
        validation.check_index_values(q, k, *others[-NUM_INDEX_TENSORS:], *longest)
        run(dout, q, k, *others)

    return checked


def _cpu_backward(call: BackwardSignature, problem: BackwardProblem, plan: BackwardPlan) -> Callable[..., None]:
    """The tile-level model of the kernels, in PyTorch."""
    from . import cpu_backend

    scales = (call.forward.scale, float(call.forward.softcap))

    def run(*tensors: torch.Tensor | None) -> None:
        cpu_backend.backward(plan, problem, cpu_backend.BackwardTensors(*tensors), *scales)

    return run


def cuda_backward(call: BackwardSignature, problem: BackwardProblem, plan: BackwardPlan) -> Callable[..., None]:
    """A plan's kernels on a Hopper GPU, with their scratch."""
    from . import compiler, runtime

    forward, spec = problem.forward, call.forward
    scales = ScoreScales.of(spec.scale, float(spec.softcap))
    launch = runtime.backward_launcher(
        runtime.load_backward_kernels(compiler.get_kernel(plan.config)),
        group_parts=plan.group_parts,
        num_ctas=plan.num_ctas,
        heads_per_section=plan.heads_per_section,
        least_heads_in_last_section=plan.least_heads_in_last_section,
        softmax_scale=spec.scale,
        score_scale=scales.score_scale,
        exp2_scale=scales.exp2_scale,
        window_left=forward.mask.window_left,
        window_right=forward.mask.window_right,
        attention_chunk=forward.mask.attention_chunk,
    )
    rows = math.prod(call.statistics_shape(plan.config.block_m)[1:])
    device = spec.q.device
    new_scratch = functools.partial(torch.empty, plan.dq_scratch_floats(rows), dtype=torch.float32, device=device)
    key_parts = plan.key_part_floats(call.num_key_blocks(plan.config.block_n))
    new_key_parts = functools.partial(torch.empty, key_parts, dtype=torch.float32, device=device)
    new_gradients = tuple(map(_allocator, (spec.q, spec.k, spec.v)))

    def run(dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, *index_tensors) -> None:
        # The kernels write all gradients; those that nobody wants go to scratch.
        dq, dk, dv = (
            new() if gradient is None else gradient for new, gradient in zip(new_gradients, (dq, dk, dv), strict=True)
        )
        scratch = (new_scratch(), new_key_parts() if key_parts else None)
        launch(dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, *index_tensors, *scratch)

    return run
