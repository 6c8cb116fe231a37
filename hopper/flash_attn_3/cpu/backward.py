"""The backward kernels' algorithm, tile by tile.

Tile sizes and block ranges are the kernels'; so are the places where numbers are rounded. Key blocks, which the kernel
spreads over CTAs with batch and heads, come one after another here, so sums are always made in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch

from ..backward_plan import BackwardPlan, BackwardProblem, padded_offset
from ..block_range import query_block_range
from ..config import Score, SeqLayout
from ..problem import MaskSpec, ScoreScales
from .mask import visible_pairs
from .row_statistics import row_statistics
from .sequences import sequence_rows, used_lengths


@dataclasses.dataclass(frozen=True)
class BackwardTensors:
    """All tensors of one backward call, or views of them for sequences of equal length.

    Attributes:
        dout: gradient of out, shaped like it.
        q, k, v, out, lse: arguments and results of the forward pass.
        dlse: gradient of lse, shaped like it; None where it is zero.
        statistics: scratch for the two `row_statistics`, fp32 (2, batch, heads_q, rows) with rows a multiple of
            block_m, or (2, heads_q, `backward_plan.padded_rows`) with cu_seqlens_q.
        dq, dk, dv: the gradients, shaped like q, k and v; None: not wanted.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), or None for a dense side.
        seqused_q, seqused_k: int32 (batch), rows of each sequence that exist, or None for all.
    """

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dlse: torch.Tensor | None
    statistics: torch.Tensor
    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def backward(
    plan: BackwardPlan, problem: BackwardProblem, tensors: BackwardTensors, softmax_scale: float, softcap: float
) -> None:
    """Gradients of attention on CPU tensors; writes statistics, dq, dk and dv in place, every element.

    Rows that do not exist (past seqused, or outside every segment) have gradient 0, and what the other tensors hold
    there is not read. Rows that exist and see nothing, or that nothing sees, have gradient 0, too;
    their dout is read, and must be finite.

    Tensors in float64 are computed in float64 throughout; nothing is rounded then.
    """
    for gradient in (tensors.dq, tensors.dk, tensors.dv):
        if gradient is not None:
            gradient.zero_()
    tensors.statistics[0] = 0.0
    tensors.statistics[1] = math.inf
    scales = ScoreScales.of(softmax_scale, softcap)
    for part in _equally_long(plan, problem, tensors):
        part.statistics[0], part.statistics[1] = row_statistics(part.dout, part.out, part.lse, part.dlse)
        _differentiate(plan, problem.forward.mask, scales, softmax_scale, part)


def _equally_long(plan: BackwardPlan, problem: BackwardProblem, call: BackwardTensors) -> Iterator[BackwardTensors]:
    """The existing rows of a call's sequences, each tensor as (b, len, ...): all at once where they are dense."""
    if problem.forward.seq_layout is SeqLayout.DENSE:
        yield dataclasses.replace(call, statistics=call.statistics[..., : call.q.shape[1]])
        return
    batch = problem.forward.batch
    lengths_q = used_lengths(batch, call.q, call.cu_seqlens_q, call.seqused_q)
    lengths_k = used_lengths(batch, call.k, call.cu_seqlens_k, call.seqused_k)
    for sequence, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        of_q = functools.partial(_rows_of, call.cu_seqlens_q, sequence, len_q)
        of_k = functools.partial(_rows_of, call.cu_seqlens_k, sequence, len_k)
        yield BackwardTensors(
            dout=of_q(call.dout),
            q=of_q(call.q),
            k=of_k(call.k),
            v=of_k(call.v),
            out=of_q(call.out),
            lse=of_q(call.lse.mT).mT,
            dlse=None if call.dlse is None else of_q(call.dlse.mT).mT,
            statistics=_statistics_of(call.statistics, call.cu_seqlens_q, sequence, len_q, plan.config.block_m),
            dq=of_q(call.dq),
            dk=of_k(call.dk),
            dv=of_k(call.dv),
        )


def _rows_of(
    cu_seqlens: torch.Tensor | None, sequence: int, length: int, tensor: torch.Tensor | None
) -> torch.Tensor | None:
    return None if tensor is None else sequence_rows(tensor, cu_seqlens, sequence, length)


def _statistics_of(
    statistics: torch.Tensor, cu_seqlens_q: torch.Tensor | None, sequence: int, len_q: int, block_m: int
) -> torch.Tensor:
    """One sequence's rows (2, 1, h, len_q) in the scratch of a call."""
    if cu_seqlens_q is None:
        return statistics[:, sequence : sequence + 1, :, :len_q]
    return statistics.narrow(2, padded_offset(int(cu_seqlens_q[sequence]), sequence, block_m), len_q)[:, None]


def _differentiate(
    plan: BackwardPlan, mask: MaskSpec, scales: ScoreScales, softmax_scale: float, part: BackwardTensors
) -> None:
    """All tiles of equally long sequences."""
    block_n, len_k, heads_kv = plan.config.block_n, part.k.shape[1], part.k.shape[2]
    accumulate = torch.promote_types(part.q.dtype, torch.float32)
    # (b, h, ...) with the query heads of each kv head in a dimension of their own.
    heads_first = (part.q.transpose(1, 2), part.dout.transpose(1, 2), *part.statistics)
    rows = _QueryRows(*(x.unflatten(1, (heads_kv, -1)).to(accumulate) for x in heads_first))
    dq = torch.zeros_like(rows.q)
    for n_block in range(-(-len_k // block_n)):
        keys = slice(n_block * block_n, min((n_block + 1) * block_n, len_k))
        k = part.k[:, keys].transpose(1, 2).to(accumulate)  # (b, hk, n, d)
        v = part.v[:, keys].transpose(1, 2).to(accumulate)  # (b, hk, n, dv)
        dk, dv = _differentiate_block(plan, mask, scales, n_block, len_k, rows, k, v, part.q.dtype, dq)
        # The scale of the scores meets dq and dk only here: it is not in the rounded gradients of the scores.
        if part.dk is not None:
            part.dk[:, keys] = (dk * softmax_scale).transpose(1, 2).to(part.dk.dtype)
        if part.dv is not None:
            part.dv[:, keys] = dv.transpose(1, 2).to(part.dv.dtype)
    if part.dq is not None:
        part.dq.copy_((dq * softmax_scale).flatten(1, 2).transpose(1, 2))


@dataclasses.dataclass(frozen=True)
class _QueryRows:
    """What the main loop reads of the query side."""

    q: torch.Tensor  # (b, hk, g, m, d)
    dout: torch.Tensor  # (b, hk, g, m, dv)
    softmax_d: torch.Tensor  # (b, hk, g, m)
    lse_log2: torch.Tensor  # (b, hk, g, m)

    def tile(self, rows: range) -> _QueryRows:
        """Some of the rows; the heads that share keys are rows of one product: (b, hk, g * m, ...)."""
        tile = slice(rows.start, rows.stop)
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return _QueryRows(*(x[:, :, :, tile].flatten(2, 3) for x in fields))


def _differentiate_block(
    plan: BackwardPlan,
    mask: MaskSpec,
    scales: ScoreScales,
    n_block: int,
    len_k: int,
    query_rows: _QueryRows,
    k: torch.Tensor,  # (b, hk, n, d)
    v: torch.Tensor,  # (b, hk, n, dv)
    dtype: torch.dtype,
    dq: torch.Tensor,  # (b, hk, g, m, d)
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of keys against the query blocks that see it.

    Adds to ``dq``; returns dk (b, hk, n, d), both without the softmax scale, and dv (b, hk, n, dv).
    """
    block_m, block_n = plan.config.block_m, plan.config.block_n
    group, len_q = query_rows.q.shape[2:4]
    keys = range(n_block * block_n, n_block * block_n + k.shape[2])
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    blocks = query_block_range(mask, n_block, block_m, block_n, len_q, len_k)
    for m_block in range(blocks.begin, blocks.end):
        rows = range(m_block * block_m, min((m_block + 1) * block_m, len_q))
        tile = query_rows.tile(rows)
        scores = tile.q @ k.mT  # (b, hk, g * m, n)
        if plan.config.score is Score.SOFTCAP:
            scores = torch.tanh(scores * scales.score_scale)
        exponents = scores * scales.exp2_scale - tile.lse_log2[..., None]
        if not blocks.is_full(m_block):
            visible = visible_pairs(mask, rows, keys, len_q, len_k).repeat(group, 1)
            exponents = exponents.masked_fill(~visible, -math.inf)
        probabilities = torch.exp2(exponents)
        dscores = probabilities * (tile.dout @ v.mT - tile.softmax_d[..., None])
        if plan.config.score is Score.SOFTCAP:
            dscores = dscores * (1.0 - scores.square())
        # The tensor cores read both in the input type.
        probabilities, dscores = (x.to(dtype).to(x.dtype) for x in (probabilities, dscores))
        dv += probabilities.mT @ tile.dout
        dk += dscores.mT @ tile.q
        dq[:, :, :, rows.start : rows.stop] += (dscores @ k).unflatten(2, (group, -1))
    return dk, dv
