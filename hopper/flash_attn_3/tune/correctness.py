"""Whether a kernel computes attention: its result on some heads against float64, all of it against NaN."""

from __future__ import annotations

import dataclasses

import torch

from ..problem import MaskSpec
from .shapes import TuneShape

#: (sequence, head) pairs that are compared, spread over the batch.
CHECKED_HEADS = 3
#: Query rows whose scores the reference holds at once.
ROWS = 2048
#: A result is wrong if its relative error (Frobenius norm) exceeds this; rounding to bfloat16 leaves 2e-3 to 4e-3.
LARGEST_RELATIVE_ERROR = 1e-2
#: A log-sum-exp is wrong if it differs by more: a missed key block moves it further, fp32 and the hardware tanh do not.
LARGEST_LSE_ERROR = 1e-2
#: How much larger than the others the first key is where scores grow along the sequence.
STEEPNESS = 10.0


@dataclasses.dataclass(frozen=True)
class Reference:
    """Exact results of the checked heads, float64: out (heads, seqlen, head_dim_v), lse (heads, seqlen)."""

    out: torch.Tensor
    lse: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Trial:
    """Inputs (batch, seqlen, heads, head_dim or head_dim_v), and what attention makes of them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    exact: Reference


def trials(shape: TuneShape, device: str) -> tuple[Trial, Trial]:
    """Two kinds of bfloat16 inputs: with scores that grow as a kernel goes from the last key to the first, so that its
    softmax must correct what it has; and plain random ones, as kernels are timed on."""
    torch.manual_seed(0)
    key = shape.key
    q, k, v = (
        torch.randn(shape.batch, shape.seqlen, shape.heads, width, device=device, dtype=torch.bfloat16)
        for width in (key.head_dim, key.head_dim, key.head_dim_v)
    )
    growth = torch.linspace(STEEPNESS, 1.0, shape.seqlen, device=device).to(k.dtype)
    steep_k = k * growth[:, None, None]
    return Trial(q, steep_k, v, reference(q, steep_k, v, shape)), Trial(q, k, v, reference(q, k, v, shape))


def checked_heads(shape: TuneShape) -> list[tuple[int, int]]:
    """The (sequence, head) pairs that are compared; the first and the last are among them."""
    last = shape.batch * shape.heads - 1
    return [divmod(last * i // (CHECKED_HEADS - 1), shape.heads) for i in range(CHECKED_HEADS)]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: TuneShape) -> Reference:
    """Plain attention in float64. q, k: (batch, seqlen, heads, head_dim); v: (batch, seqlen, heads, head_dim_v)."""
    results = [
        attend(*(x[sequence, :, head].double() for x in (q, k, v)), shape.mask, shape.softcap)
        for sequence, head in checked_heads(shape)
    ]
    return Reference(*(torch.stack(part) for part in zip(*results, strict=True)))


def attend(
    q: torch.Tensor,  # (seqlen_q, head_dim)
    k: torch.Tensor,  # (seqlen_k, head_dim)
    v: torch.Tensor,  # (seqlen_k, head_dim_v)
    mask: MaskSpec,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (seqlen_q, head_dim_v) and lse (seqlen_q) of one head; 0 and -inf in rows without a key."""
    outs, lses = [], []
    keys = torch.arange(k.shape[0], device=q.device)
    for rows in torch.arange(q.shape[0], device=q.device).split(ROWS):
        scores = q[rows] @ k.T * q.shape[-1] ** -0.5  # (rows, seqlen_k)
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        position = rows[:, None] + (k.shape[0] - q.shape[0])
        distance = position - keys  # how far a key lies to the left of the query
        left, right = mask.window_left, mask.window_right
        hidden = (distance > left) & (left >= 0) | (-distance > right) & (right >= 0)
        scores.masked_fill_(hidden, float("-inf"))
        # Without a key a row's softmax is 0 / 0.
        outs.append(torch.softmax(scores, -1).masked_fill_(hidden, 0.0) @ v)
        lses.append(torch.logsumexp(scores, -1))
    return torch.cat(outs), torch.cat(lses)


def relative_error(out: torch.Tensor, exact: Reference, shape: TuneShape) -> float:
    """Of the checked heads of ``out`` (batch, seqlen, heads, head_dim_v), in the Frobenius norm."""
    actual = torch.stack([out[sequence, :, head].double() for sequence, head in checked_heads(shape)])
    return float((actual - exact.out).norm() / exact.out.norm())


def what_is_wrong(out: torch.Tensor, lse: torch.Tensor, exact: Reference, shape: TuneShape) -> str | None:
    """What is wrong with a result, or None. ``out`` and ``lse`` (batch, heads, seqlen) were full of NaN before."""
    for name, x in (("out", out), ("lse", lse)):
        if not bool(x.isfinite().all()):
            return f"{name} has rows that were not written, or are not finite"
    error = relative_error(out, exact, shape)
    if not error <= LARGEST_RELATIVE_ERROR:
        return f"relative error {error:.1e}"
    actual = torch.stack([lse[sequence, head].double() for sequence, head in checked_heads(shape)])
    lse_error = float((actual - exact.lse).abs().max())
    if not lse_error <= LARGEST_LSE_ERROR:
        return f"log-sum-exp is off by {lse_error:.1e}"
    return None
