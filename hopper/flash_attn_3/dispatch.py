"""From tensors to a launch, remembered per signature.

The second call with a signature costs one dictionary lookup, the allocation of the results and one call of the runtime.
Nothing here depends on the values of tensors, so nothing here synchronises.
"""

from __future__ import annotations

import threading

import torch
from torch.autograd import forward_ad

from . import validation
from .backward_launch import BackwardLaunch, prepare_backward
from .backward_validation import check_backward
from .launch import ForwardLaunch, prepare_forward
from .signature import (
    ALL_WANTED,
    NO_EXTRAS,
    NO_INDEX_TENSORS,
    NO_OPTIONS,
    ForwardOptions,
    ForwardSignature,
    OptionalTensors,
    backward_signature,
    forward_signature,
    plain_options,
)
from .transforms import reject_tangents, reject_transforms

#: Launches that are remembered; the oldest goes first. A batch of sequences of new lengths needs a new one.
MAX_LAUNCHES = 4096
#: Bytes that TMA takes addresses and strides in multiples of.
_TMA_ALIGNMENT = 16

_launches: dict[tuple, ForwardLaunch] = {}
_backward_launches: dict[tuple, BackwardLaunch] = {}
_adding = threading.Lock()

#: dq, dk, dv; None where they are not wanted.
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: OptionalTensors = NO_EXTRAS,
    options: ForwardOptions = NO_OPTIONS,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, without autograd and without operators: what every entry point ends in.

    Args:
        q, k, v: as in `flash_attn_func` or, with ``cu_seqlens_*``, `flash_attn_varlen_func`; either side may be dense.
        extras, options: the rest of the call. Plain tuples in the same order do, and are made faster.
        out: where to write the result, its rows contiguous; allocated by default.

    Returns:
        out (q's shape with v's head dim, q's dtype; ``out`` itself where it is given) and the log-sum-exp of the
        scores, fp32 (b, h, sq), or (h, total_q) with cu_seqlens_q.
    """
    if forward_ad._current_level >= 0:
        reject_tangents(q, k, v)
    options = plain_options(options)
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, q_descale, k_descale, v_descale = extras
    try:
        key = (
            *_tensor_key(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
            q_descale is None and k_descale is None and v_descale is None,
            options,
        )
        launch = _launches.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # No tensor, one without a shape, or an option that cannot be hashed: preparing a launch tells which.
        key = launch = None
    if launch is None:
        launch = _prepare(key, forward_signature(q, k, v, extras, options, out))
    lse = launch.new_lse()
    try:
        # One test, of what most calls bring: this is on the path of each.
        if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
            q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
        if out is None:
            out = launch.new_out()
        promoted_out = None if launch.new_promoted_out is None else launch.new_promoted_out()
        launch.run(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, promoted_out)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        # A rule that is broken is told in the rule's words, whoever noticed.
        reject_transforms()
        validation.check_forward(forward_signature(q, k, v, extras, options, out))
        raise
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    index_tensors: tuple[torch.Tensor | None, ...] = NO_INDEX_TENSORS,
    options: ForwardOptions = NO_OPTIONS,
    deterministic: bool = False,
    wanted: tuple[bool, bool, bool] = ALL_WANTED,
    gradients: Gradients | None = None,
) -> tuple[Gradients, torch.Tensor]:
    """The gradients of q, k and v: what every backward pass ends in.

    Args:
        dout: gradient of out.
        dlse: gradient of lse; None where it is zero.
        q, k, v, index_tensors, options: of the forward call; the index tensors are the first four of its extras.
        out, lse: its results.
        deterministic: whether equal calls have bitwise equal gradients.
        wanted: which of dq, dk and dv to compute; the others are None in the result.
        gradients: where to write them, their rows contiguous, in place of ``wanted``; allocated by default.

    Returns:
        (dq, dk, dv), and the statistics of the query rows, softmax_d and lse_log2 (`cpu.row_statistics`), as one fp32
        tensor (2, b, h, rows) or (2, h, rows) with the rows laid out as `backward_plan` says.
    """
    if forward_ad._current_level >= 0:
        reject_tangents(dout, dlse, q, k, v, out)
    options = plain_options(options)
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = index_tensors
    if gradients is not None:
        wanted = tuple([gradient is not None for gradient in gradients])
    arguments = (dout, dlse, q, k, v, out, lse, index_tensors, options, deterministic, gradients)
    try:
        key = (
            *_tensor_key(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
            wanted,
            deterministic,
            options,
        )
        launch = _backward_launches.get(key)
    except (AttributeError, TypeError, RuntimeError):
        key = launch = None
    if launch is None:
        launch = prepare_backward(backward_signature(*arguments))
        if launch.checks_tensors:
            _remember(_backward_launches, key, launch)
    statistics = launch.new_statistics()
    try:
        if gradients is None:
            new_dq, new_dk, new_dv = launch.new_gradients
            gradients = (
                new_dq() if wanted[0] else None,
                new_dk() if wanted[1] else None,
                new_dv() if wanted[2] else None,
            )
        # One test, of what most calls bring: this is on the path of each.
        if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
            q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
        # Autograd hands over gradients of any layout, views of what came after attention.
        out, dout = readable_by_tma(out), readable_by_tma(dout)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        dq, dk, dv = gradients
        launch.run(dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, *index_tensors)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        reject_transforms(dout, dlse)
        check_backward(backward_signature(*arguments))
        raise
    return gradients, statistics


def _tensor_key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
) -> tuple:
    """What launches, forward and backward, depend on among the tensors of the forward call."""
    return (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        q.device,
        None if cu_seqlens_q is None else cu_seqlens_q.shape,
        cu_seqlens_k is None,
        seqused_q is None,
        seqused_k is None,
    )


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x``, copied if its last dimension is not contiguous; the other strides are free."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def readable_by_tma(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where TMA cannot read it: it needs contiguous rows, and steps and an address of whole 16 bytes.

    Rows of a valid call, whose head dims are multiples of 8, have whole 16 bytes, so where ``x`` is contiguous only its
    address is left to look at.
    """
    if x.data_ptr() % _TMA_ALIGNMENT == 0 and (x.is_contiguous() or _has_aligned_strides(x)):
        return x
    # Not `contiguous`, which gives a misaligned tensor back.
    return x.clone(memory_format=torch.contiguous_format)


def _has_aligned_strides(x: torch.Tensor) -> bool:
    *strides, last = x.stride()
    elements = _TMA_ALIGNMENT // x.element_size()
    # The stride of a dimension of size 1 is never stepped over.
    return last == 1 and all(
        stride % elements == 0 or size == 1 for stride, size in zip(strides, x.shape[:-1], strict=True)
    )


def _prepare(key: tuple, call: ForwardSignature) -> ForwardLaunch:
    """Prepare a call's launch, and remember it if its key will do.

    A key holds what a launch depends on, not what makes a call valid: a remembered launch must check its tensors
    itself, and descales it never sees.
    """
    launch = prepare_forward(call)
    if launch.checks_tensors and call.q_descale is call.k_descale is call.v_descale is None:
        _remember(_launches, key, launch)
    return launch


def _remember(launches: dict, key: tuple, launch: ForwardLaunch | BackwardLaunch) -> None:
    with _adding:  # two threads may have prepared the same launch; either will do
        if len(launches) >= MAX_LAUNCHES:
            del launches[next(iter(launches))]
        launches[key] = launch
