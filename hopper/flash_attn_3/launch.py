"""What a signature comes down to: the tensors to allocate and a function of tensors that writes them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import validation
from .config import Dtype, Score, SeqLayout
from .errors import UnsupportedDeviceError
from .heuristics import ForwardPlan, plan_forward
from .problem import HOPPER_SMS, ForwardProblem, Packing, ScoreScales, normalize_mask
from .signature import NUM_INDEX_TENSORS, ForwardSignature

if TYPE_CHECKING:
    from .cache import CompiledKernel

HOPPER = (9, 0)

_DTYPES = {torch.float16: Dtype.FP16, torch.bfloat16: Dtype.BF16}


@dataclasses.dataclass(frozen=True)
class ForwardLaunch:
    """One signature's forward pass, ready to run on any tensors of that signature.

    Attributes:
        new_out, new_lse: allocate, uninitialised and contiguous.
        new_promoted_out: the same for the kernel's scratch; None where it needs none.
        run: ``run(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, promoted_out)`` writes out and
            lse.
        checks_tensors: whether ``run`` raises TypeError or ValueError for tensors of another signature.
    """

    new_out: Callable[[], torch.Tensor]
    new_lse: Callable[[], torch.Tensor]
    new_promoted_out: Callable[[], torch.Tensor] | None
    run: Callable[..., None]
    checks_tensors: bool


def prepare_forward(call: ForwardSignature) -> ForwardLaunch:
    """Judge a signature, plan it and get its kernel."""
    validation.check_forward(call)
    problem = forward_problem(call, device_sms(call.q.device))
    plan = plan_forward(problem)
    is_empty = plan.num_ctas == 0 or math.prod(call.out_shape) == 0
    if call.q.device.type == "cpu":
        run, checks_tensors = _checked(call, _write_nothing if is_empty else _cpu_forward(call, problem, plan)), False
    elif is_empty:
        run, checks_tensors = _write_nothing, False
    else:
        run, checks_tensors = _cuda_forward(call, problem, plan), True
    # Sizes one by one: torch takes half a microsecond more to read a tuple of them.
    return ForwardLaunch(
        functools.partial(torch.empty, *call.out_shape, dtype=call.q.dtype, device=call.q.device),
        functools.partial(torch.empty, *call.lse_shape, dtype=torch.float32, device=call.q.device),
        _new_promoted_out(plan, call.q.device),
        run,
        checks_tensors,
    )


def _new_promoted_out(plan: ForwardPlan, device: torch.device) -> Callable[[], torch.Tensor] | None:
    if plan.promoted_floats == 0 or device.type == "cpu":
        return None
    return functools.partial(torch.empty, plan.promoted_floats, dtype=torch.float32, device=device)


def forward_problem(call: ForwardSignature, num_sms: int) -> ForwardProblem:
    """The planner's view of a valid signature on a device of ``num_sms`` multiprocessors."""
    validation.check_sm_margin(call.sm_margin, num_sms)
    return ForwardProblem(
        dtype=_DTYPES[call.q.dtype],
        batch=call.batch,
        max_seqlen_q=call.seqlen_q,
        max_seqlen_k=call.seqlen_k,
        heads_q=call.q.shape[-2],
        heads_kv=call.k.shape[-2],
        head_dim=call.q.shape[-1],
        head_dim_v=call.v.shape[-1],
        mask=normalize_mask(call.causal, call.window_size, call.attention_chunk, call.seqlen_q, call.seqlen_k),
        score=Score.SOFTCAP if call.softcap > 0 else Score.SCALED,
        seq_layout=SeqLayout.VARLEN if call.is_varlen else SeqLayout.DENSE,
        packing={None: Packing.AUTO, True: Packing.ALWAYS, False: Packing.NEVER}[call.pack_gqa],
        num_sms=num_sms - call.sm_margin,
    )


def device_sms(device: torch.device) -> int:
    """Multiprocessors of a device that our kernels run on; any other GPU is an error, never a fallback."""
    if device.type == "cpu":
        return HOPPER_SMS  # that the CPU model pretends to have
    from . import runtime

    capability = runtime.compute_capability(device.index)
    if capability != HOPPER:
        raise UnsupportedDeviceError(
            f"{device} has compute capability {capability[0]}.{capability[1]}; the kernels need a Hopper GPU "
            "(H100, H200, H800: compute capability 9.0). CPU tensors run everywhere"
        )
    return runtime.num_sms(device.index)


# -- what runs -------------------------------------------------------------------------------------------


def _write_nothing(*tensors: torch.Tensor | None) -> None:
    """No query row, so no output."""


def _checked(call: ForwardSignature, run: Callable[..., None]) -> Callable[..., None]:
    """``run`` after a look at the index tensors' values, also where a wrong max_seqlen says that there is nothing."""
    longest = (call.max_seqlen_q, call.max_seqlen_k)

    def checked(q, k, v, out, lse, *others: torch.Tensor | None) -> None:
        validation.check_index_values(q, k, *others[:NUM_INDEX_TENSORS], *longest)
        run(q, k, v, out, lse, *others)

    return checked


def _cpu_forward(call: ForwardSignature, problem: ForwardProblem, plan: ForwardPlan) -> Callable[..., None]:
    """The tile-level model of the kernel, in PyTorch."""
    from . import cpu_backend

    scales = (call.scale, float(call.softcap))

    def run(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, promoted_out) -> None:
        cpu_backend.forward(plan, problem, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *scales)

    return run


def _cuda_forward(call: ForwardSignature, problem: ForwardProblem, plan: ForwardPlan) -> Callable[..., None]:
    from . import compiler

    return cuda_forward(compiler.get_kernel(plan.config), problem, plan, call.scale, float(call.softcap))


def cuda_forward(
    kernel: CompiledKernel, problem: ForwardProblem, plan: ForwardPlan, softmax_scale: float, softcap: float
) -> Callable[..., None]:
    """A plan's kernel on a Hopper GPU: the runtime's own function, so that a call meets no more Python."""
    from . import runtime

    scales = ScoreScales.of(softmax_scale, softcap)
    return runtime.forward_launcher(
        runtime.load_kernel(kernel),
        max_seqlen_q=problem.max_seqlen_q,
        max_seqlen_k=problem.max_seqlen_k,
        num_ctas=plan.num_ctas,
        packed_heads=plan.packed_heads,
        num_value_passes=plan.num_value_passes,
        heads_per_section=plan.heads_per_section,
        least_heads_in_last_section=plan.least_heads_in_last_section,
        score_scale=scales.score_scale,
        exp2_scale=scales.exp2_scale,
        window_left=problem.mask.window_left,
        window_right=problem.mask.window_right,
        attention_chunk=problem.mask.attention_chunk,
    )
