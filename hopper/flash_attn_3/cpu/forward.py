"""The forward kernel's algorithm, tile by tile.

Tile sizes, block ranges and the order of the key blocks are the kernel's; so are the places where numbers are
rounded. Batch and heads, which the kernel spreads over CTAs, are tensor dimensions here. Column passes over wide
values are not modelled: each pass computes the same probabilities.
"""

from __future__ import annotations

import torch

from ..block_range import block_range
from ..config import Score, SeqLayout
from ..heuristics import ForwardPlan
from ..problem import ForwardProblem, MaskSpec, ScoreScales
from .mask import visible_pairs
from .sequences import sequence_rows, used_lengths
from .softmax import NEG_INF, OnlineSoftmax


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def forward(
    plan: ForwardPlan,
    problem: ForwardProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> None:
    """Attention on CPU tensors; writes ``out`` and ``lse`` in place.

    Rows that do not exist (past seqused_q, or outside every segment) are left as they are in both. Rows without
    a visible key get out 0 and LSE -inf.

    Args:
        plan, problem: the planner's answer and its question; they give tile sizes and mask.
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with cu_seqlens_q.
        k: (batch, seqlen_k, heads_kv, head_dim), or (total_k, heads_kv, head_dim) with cu_seqlens_k.
        v: like k, with head_dim_v.
        out: like q, with head_dim_v.
        lse: fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q) with cu_seqlens_q.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), or None for a dense side.
        seqused_q, seqused_k: int32 (batch), rows of each sequence that exist, or None for all.
        softmax_scale: factor of q.k, positive.
        softcap: c of c * tanh(softmax_scale * q.k / c), 0 for none.
    """
    scales = ScoreScales.of(softmax_scale, softcap)
    if problem.seq_layout is SeqLayout.DENSE:
        _attend(plan, problem.mask, scales, q, k, v, out, lse)
        return
    lengths_q = used_lengths(problem.batch, q, cu_seqlens_q, seqused_q)
    lengths_k = used_lengths(problem.batch, k, cu_seqlens_k, seqused_k)
    for sequence, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        _attend(
            plan,
            problem.mask,
            scales,
            sequence_rows(q, cu_seqlens_q, sequence, len_q),
            sequence_rows(k, cu_seqlens_k, sequence, len_k),
            sequence_rows(v, cu_seqlens_k, sequence, len_k),
            sequence_rows(out, cu_seqlens_q, sequence, len_q),
            sequence_rows(lse.mT, cu_seqlens_q, sequence, len_q).mT,
        )


def _attend(
    plan: ForwardPlan,
    mask: MaskSpec,
    scales: ScoreScales,
    q: torch.Tensor,  # (b, len_q, h, d)
    k: torch.Tensor,  # (b, len_k, hk, d)
    v: torch.Tensor,  # (b, len_k, hk, dv)
    out: torch.Tensor,  # (b, len_q, h, dv)
    lse: torch.Tensor,  # (b, h, len_q)
) -> None:
    """All tiles of equally long sequences."""
    block_m = plan.config.block_m
    len_q, heads_kv = q.shape[1], k.shape[2]
    for m_block in range(-(-len_q // block_m)):
        rows = range(m_block * block_m, min((m_block + 1) * block_m, len_q))
        tile = slice(rows.start, rows.stop)
        q_tile = q[:, tile].unflatten(2, (heads_kv, -1))  # (b, m, hk, g, d)
        tile_out, tile_lse = _attend_tile(plan, mask, scales, m_block, rows, len_q, q_tile, k, v)
        out[:, tile] = tile_out.permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[:, :, tile] = tile_lse.flatten(1, 2)


def _attend_tile(
    plan: ForwardPlan,
    mask: MaskSpec,
    scales: ScoreScales,
    m_block: int,
    rows: range,
    len_q: int,
    q: torch.Tensor,  # (b, m, hk, g, d)
    k: torch.Tensor,  # (b, len_k, hk, d)
    v: torch.Tensor,  # (b, len_k, hk, dv)
) -> tuple[torch.Tensor, torch.Tensor]:
    """One tile of query rows against its key blocks, right to left.

    Returns:
        The output (b, hk, g, m, dv) and the LSE (b, hk, g, m), in the accumulation type.
    """
    block_n, len_k, group = plan.config.block_n, k.shape[1], q.shape[3]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    # The query heads that share keys are rows of one product, so that keys and values need no copies.
    q_rows = q.permute(0, 2, 3, 1, 4).flatten(2, 3).to(accumulate)  # (b, hk, g * m, d)
    softmax = OnlineSoftmax(tuple(q_rows.shape[:3]), scales.exp2_scale, accumulate, plan.config.rescale)
    output = q_rows.new_zeros(*q_rows.shape[:3], v.shape[-1])
    blocks = block_range(mask, m_block, plan.config.block_m, block_n, len_q, len_k)
    for n_block in reversed(range(blocks.begin, blocks.end)):
        keys = range(n_block * block_n, min((n_block + 1) * block_n, len_k))
        k_block = k[:, keys.start : keys.stop].transpose(1, 2).to(accumulate)  # (b, hk, n, d)
        v_block = v[:, keys.start : keys.stop].transpose(1, 2).to(accumulate)  # (b, hk, n, dv)
        scores = q_rows @ k_block.mT  # (b, hk, g * m, n)
        if plan.config.score is Score.SOFTCAP:
            scores = torch.tanh(scores * scales.score_scale)
        if not blocks.is_full(n_block):
            visible = visible_pairs(mask, rows, keys, len_q, len_k).repeat(group, 1)
            scores = scores.masked_fill(~visible, NEG_INF)
        probabilities, correction = softmax.update(scores)
        # The tensor cores read P in the input type; the row sum keeps the unrounded values.
        probabilities = probabilities.to(q.dtype).to(accumulate)
        output = output * correction[..., None] + probabilities @ v_block
    normalizer, lse = softmax.finish()
    output = output * normalizer[..., None]
    return output.unflatten(2, (group, -1)), lse.unflatten(2, (group, -1))
