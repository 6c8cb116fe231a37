"""From tensors to a launch: signature -> plan -> kernel -> handle, remembered per signature.

The second call with a signature costs one dictionary lookup and the launch. Nothing here depends on the values
of tensors, so nothing here synchronises.
"""

from __future__ import annotations

import abc
import functools
import math
from typing import Any

import torch

from . import validation
from .config import Dtype, Score, SeqLayout
from .errors import UnsupportedDeviceError
from .heuristics import ForwardPlan, plan_forward
from .problem import ForwardProblem, ScoreScales, normalize_mask
from .signature import ForwardSignature, forward_signature

#: Multiprocessors that the CPU model pretends to have: those of an H100 or H200.
CPU_MODEL_SMS = 132
HOPPER = (9, 0)

_DTYPES = {torch.float16: Dtype.FP16, torch.bfloat16: Dtype.BF16}


class ForwardLaunch(abc.ABC):
    """What a signature comes down to: the shapes to allocate and something to run."""

    def __init__(self, call: ForwardSignature):
        self.out_shape = call.out_shape
        self.lse_shape = call.lse_shape
        self.is_varlen = call.is_varlen

    @abc.abstractmethod
    def run(self, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> None:
        """Write ``out`` and ``lse``."""


class NoQueries(ForwardLaunch):
    """No query row, so no output."""

    def run(self, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> None:
        pass


class CpuForward(ForwardLaunch):
    """The tile-level model of the kernel, in PyTorch."""

    def __init__(self, call: ForwardSignature, problem: ForwardProblem, plan: ForwardPlan):
        from . import cpu_backend

        super().__init__(call)
        self._forward = functools.partial(cpu_backend.forward, plan, problem)
        self._scales = (call.scale, float(call.softcap))

    def run(self, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> None:
        self._forward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *self._scales)


class CudaForward(ForwardLaunch):
    """A kernel on a Hopper GPU."""

    def __init__(self, call: ForwardSignature, problem: ForwardProblem, plan: ForwardPlan):
        from . import compiler, runtime

        super().__init__(call)
        self._forward = runtime.forward
        self._handle = runtime.load_kernel(compiler.get_kernel(plan.config))
        scales = ScoreScales.of(call.scale, float(call.softcap))
        self._launch_arguments = (
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

    def run(self, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> None:
        self._forward(
            self._handle, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *self._launch_arguments
        )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, without autograd and without operators: what every entry point ends in.

    Shapes as in `flash_attn_func` and, with ``cu_seqlens_*``, `flash_attn_varlen_func`; either side may be dense.

    Returns:
        out (q's shape with v's head dim, q's dtype; ``out`` itself where it is given) and the log-sum-exp of the
        scores, fp32 (b, h, sq), or (h, total_q) with cu_seqlens_q.
    """
    launch = _find_launch(
        forward_signature(
            q,
            k,
            v,
            out,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            max_seqlen_q,
            max_seqlen_k,
            q_descale,
            k_descale,
            v_descale,
            softmax_scale,
            causal,
            window_size,
            attention_chunk,
            softcap,
            num_splits,
            sm_margin,
        )
    )
    if launch.is_varlen:
        validation.check_index_strides(
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k
        )
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
    if out is None:
        out = torch.empty(launch.out_shape, dtype=q.dtype, device=q.device)
    else:
        validation.check_last_strides(out=out)
    lse = torch.empty(launch.lse_shape, dtype=torch.float32, device=q.device)
    launch.run(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    return out, lse


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x``, copied if its last dimension is not contiguous; the other strides are free."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


@functools.lru_cache(maxsize=4096)
def _launch_for(call: ForwardSignature) -> ForwardLaunch:
    """Judge a signature, plan it and get its kernel. Errors are not remembered."""
    validation.check_forward(call)
    problem = forward_problem(call, _num_sms(call.q.device))
    plan = plan_forward(problem)
    if plan.num_ctas == 0 or math.prod(call.out_shape) == 0:
        return NoQueries(call)
    backend = CudaForward if call.q.device.type == "cuda" else CpuForward
    return backend(call, problem, plan)


def _find_launch(call: ForwardSignature) -> ForwardLaunch:
    try:
        return _launch_for(call)
    except TypeError:
        # An option that cannot be hashed, say a list, breaks the cache; the rules know its name.
        validation.check_forward(call)
        raise


def forward_problem(call: ForwardSignature, num_sms: int) -> ForwardProblem:
    """The planner's view of a valid signature on a device of ``num_sms`` multiprocessors."""
    validation.check_sm_margin(call.sm_margin, num_sms)
    window = (call.window_left, call.window_right)
    return ForwardProblem(
        dtype=_DTYPES[call.q.dtype],
        batch=call.batch,
        max_seqlen_q=call.seqlen_q,
        max_seqlen_k=call.seqlen_k,
        heads_q=call.q.shape[-2],
        heads_kv=call.k.shape[-2],
        head_dim=call.q.shape[-1],
        head_dim_v=call.v.shape[-1],
        mask=normalize_mask(call.causal, window, call.attention_chunk, call.seqlen_q, call.seqlen_k),
        score=Score.SOFTCAP if call.softcap > 0 else Score.SCALED,
        seq_layout=SeqLayout.VARLEN if call.is_varlen else SeqLayout.DENSE,
        num_sms=num_sms - call.sm_margin,
    )


def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device that our kernels run on; any other GPU is an error, never a fallback."""
    if device.type == "cpu":
        return CPU_MODEL_SMS
    from . import runtime

    capability = runtime.compute_capability(device.index)
    if capability != HOPPER:
        raise UnsupportedDeviceError(
            f"{device} has compute capability {capability[0]}.{capability[1]}; the kernels need a Hopper GPU "
            "(H100, H200, H800: compute capability 9.0). CPU tensors run everywhere"
        )
    return runtime.num_sms(device.index)
