"""Calls of the CPU back end below the public functions, for its tests."""

import dataclasses
import itertools

import torch

from flash_attn_3 import cpu_backend
from flash_attn_3.config import Dtype, Score, SeqLayout
from flash_attn_3.heuristics import plan_forward
from flash_attn_3.problem import ForwardProblem, normalize_mask
from reference import DENSE, FULL, AttentionOptions, Sequences, assert_attention_close

NAN = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = {
    "full": FULL,
    "causal": AttentionOptions(causal=True),
    "window": AttentionOptions(window_size=(70, 30)),
    "causal_window": AttentionOptions(causal=True, window_size=(100, -1)),
    "right_window": AttentionOptions(window_size=(-1, 17)),
    "chunk": AttentionOptions(attention_chunk=96),
}

#: (lengths_q, lengths_k) of batches with sequences of length zero, on either side and anywhere.
ZERO_LENGTHS = {
    "start": ([0, 0, 130], [0, 7, 60]),
    "middle_and_end": ([90, 0, 0, 3], [17, 40, 0, 0]),
    "alternating": ([5, 0, 70, 0], [0, 33, 200, 1]),
    "runs_of_200": ([1] + [0] * 200 + [64, 2], [3] + [0] * 100 + [1] * 100 + [0, 150]),
    "no_queries": ([0, 0], [4, 5]),
    "no_keys": ([4, 5], [0, 0]),
    "nothing": ([0], [0]),
    "decode": ([0, 1, 0, 1], [9, 180, 0, 35]),
}


def random_qkv(
    lengths, heads=(2, 1), head_dims=(64, 64), dtype=torch.bfloat16, batch=1, packed=False
) -> list[torch.Tensor]:
    """q, k, v of standard normal numbers: (b, s, h, d), or (b * s, h, d) if packed."""
    generator = torch.Generator().manual_seed(hash((*lengths, *heads, *head_dims)))
    (sq, sk), (h, hk), (d, dv) = lengths, heads, head_dims
    shapes = (batch, sq, h, d), (batch, sk, hk, d), (batch, sk, hk, dv)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [x.flatten(0, 1) for x in tensors] if packed else tensors


def problem_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, sequences: Sequences
) -> ForwardProblem:
    """What the planner is asked for a call."""
    batch, seqlen_q = batch_and_longest(q, sequences.cu_seqlens_q)
    _, seqlen_k = batch_and_longest(k, sequences.cu_seqlens_k)
    return ForwardProblem(
        dtype=Dtype.FP16 if q.dtype == torch.float16 else Dtype.BF16,
        batch=batch,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        heads_q=q.shape[-2],
        heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        mask=normalize_mask(options.causal, options.window_size, options.attention_chunk, seqlen_q, seqlen_k),
        score=Score.SOFTCAP if options.softcap > 0 else Score.SCALED,
        seq_layout=SeqLayout.DENSE if sequences == DENSE else SeqLayout.VARLEN,
        num_sms=132,
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions = FULL,
    sequences: Sequences = DENSE,
    tile: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and run one call; out and lse are NaN wherever the back end does not write.

    tile: (block_m, block_n) in place of the planner's choice.
    """
    problem = problem_of(q, k, v, options, sequences)
    plan = plan_forward(problem)
    if tile is not None:
        config = dataclasses.replace(plan.config, block_m=tile[0], block_n=tile[1])
        plan = dataclasses.replace(plan, config=config)
    out = torch.full((*q.shape[:-1], v.shape[-1]), NAN, dtype=out_dtype or q.dtype)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:-1], NAN, dtype=accumulate).mT.contiguous()  # (b, h, sq) or (h, total_q)
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    index_tensors = [
        None if field is None else torch.tensor(field, dtype=torch.int32) for field in dataclasses.astuple(sequences)
    ]
    cpu_backend.forward(plan, problem, q, k, v, out, lse, *index_tensors, scale, options.softcap)
    return out, lse


def batch_and_longest(rows: torch.Tensor, cu_seqlens: list[int] | None) -> tuple[int, int]:
    """Number of sequences, and rows of the longest."""
    if cu_seqlens is None:
        return rows.shape[0], rows.shape[1]
    lengths = [end - begin for begin, end in itertools.pairwise(cu_seqlens)]
    return len(lengths), max(lengths, default=0)


def check(q, k, v, options=FULL, sequences=DENSE, **call) -> None:
    out, lse = forward(q, k, v, options, sequences, **call)
    assert_attention_close(out, lse, q, k, v, options, sequences)


def offsets(lengths: list[int]) -> list[int]:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).tolist()
