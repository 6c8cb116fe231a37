"""The first kernel of the backward pass: what its main loop must know of each query row."""

from __future__ import annotations

import math

import torch


def row_statistics(
    dout: torch.Tensor,  # (b, m, h, dv)
    out: torch.Tensor,  # (b, m, h, dv)
    lse: torch.Tensor,  # (b, h, m)
    dlse: torch.Tensor | None,  # (b, h, m)
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax_d, lse_log2) of query rows that exist, both (b, h, m) in the accumulation type.

    softmax_d = sum(dout * out) - dlse is what the gradients of a row's probabilities have in common: the normalisation
    takes the first part away from each of them, and the log-sum-exp adds its own gradient to each. lse_log2 is the
    log-sum-exp in base 2, with +inf in place of -inf, so that every probability of a row without a key is
    exp2(score - inf) = 0. Such a row has softmax_d 0, whatever its dlse is, NaN too: its results are constants. But its
    dout must be finite: the products that make dk and dv multiply it by these zeros.
    """
    accumulate = torch.promote_types(dout.dtype, torch.float32)
    softmax_d = (dout.to(accumulate) * out.to(accumulate)).sum(-1).transpose(1, 2)
    if dlse is not None:
        softmax_d = softmax_d - dlse
    has_no_key = lse == -math.inf
    return softmax_d.masked_fill(has_no_key, 0.0), (lse * math.log2(math.e)).masked_fill(has_no_key, math.inf)
