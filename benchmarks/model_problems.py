"""What the models of launches compute with: problems of one size, and heads in sections as a kernel takes them."""

from __future__ import annotations

from flash_attn_3.config import Dtype, Mask, Score, SeqLayout
from flash_attn_3.problem import HOPPER_SMS, UNLIMITED, ForwardProblem, MaskSpec

TOKENS, FEATURES = 16384, 2048
CAUSAL = MaskSpec(Mask.CAUSAL, UNLIMITED, 0)


def model_problem(head_dim: int, seqlen: int, mask: MaskSpec) -> ForwardProblem:
    """Sequences of `seqlen` that make `TOKENS` tokens, with heads that make `FEATURES` features."""
    heads = FEATURES // head_dim
    return ForwardProblem(
        *(Dtype.BF16, TOKENS // seqlen, seqlen, seqlen, heads, heads, head_dim, head_dim),
        *(mask, Score.SCALED, SeqLayout.DENSE, HOPPER_SMS),
    )


def num_heads(head_dim: int, seqlen: int) -> int:
    """Of all sequences of that problem."""
    return TOKENS // seqlen * (FEATURES // head_dim)


def sections(num_heads: int, heads: int, least_last: int) -> list[range]:
    """Heads worked on together: sections of `heads`, the last of at least `least_last`."""
    bounds = [0]
    while num_heads - bounds[-1] - heads >= max(1, least_last):
        bounds.append(bounds[-1] + heads)
    return [range(*ends) for ends in zip(bounds, [*bounds[1:], num_heads], strict=True)]
