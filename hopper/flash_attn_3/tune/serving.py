"""Whether a kernel serves the calls that it is not timed on: ragged and packed sequences, grouped queries, NaN, rows
without a key, sequences without rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from ..config import Dtype, Mask, SeqLayout
from ..problem import ForwardProblem, MaskSpec, Packing
from ..tile_table import TileKey
from .correctness import LARGEST_LSE_ERROR, Reference, attend
from .shapes import softcap_of, whole_mask

#: (queries, keys) of the sequences: several tiles and tails, more queries than keys, none on either side.
LENGTHS = {
    SeqLayout.DENSE: ((300, 259), (300, 259)),
    SeqLayout.VARLEN: ((300, 130), (0, 70), (65, 0), (200, 333)),
}
HEADS, KV_HEADS = 4, 2
#: Keys to the left of the diagonal under a local mask.
WINDOW_LEFT = 100
#: A row is wrong if its relative error exceeds this. Rounding leaves 1e-2, the hardware tanh 2e-2; one key too few or
#: too many in a row of 300 is 8e-2.
LARGEST_ROW_ERROR = 5e-2

_TORCH_DTYPES = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16}


@dataclasses.dataclass(frozen=True)
class ServedCall:
    """A call and what attention makes of it.

    q, k, v: (batch, seqlen, heads, head_dim or head_dim_v), or with cu_seqlens (total, heads, ...);
    exact: out (total, heads, head_dim_v), lse (total, heads).
    """

    name: str
    problem: ForwardProblem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None]
    exact: Reference

    def new_results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out, and lse (batch, heads, seqlen) or (heads, total), full of NaN."""
        *rows, heads, _ = self.q.shape
        out = self.q.new_full((*rows, heads, self.v.shape[-1]), float("nan"))
        return out, out.new_full((*rows[:-1], heads, rows[-1]), float("nan"), dtype=torch.float32)


def served_calls(key: TileKey, dtype: Dtype, seq_layout: SeqLayout, num_sms: int, device: str) -> Iterator[ServedCall]:
    """Random calls of a key, with and without NaN in one key, heads packed into tiles and not."""
    torch.manual_seed(0)
    lens_q, lens_k = zip(*LENGTHS[seq_layout], strict=True)
    sizes = ((sum(lens_q), HEADS, key.head_dim), (sum(lens_k), KV_HEADS, key.head_dim))
    q, k, v = (
        torch.randn(*size, device=device).to(_TORCH_DTYPES[dtype]) for size in (*sizes, (*sizes[1][:2], key.head_dim_v))
    )
    k_with_nan = k.clone()
    k_with_nan[-lens_k[-1] // 2, 0, 0] = float("nan")
    is_dense = seq_layout is SeqLayout.DENSE
    cu_seqlens = (None, None) if is_dense else (_cumulative(lens_q, device), _cumulative(lens_k, device))
    for name, keys in (("ragged sequences", k), ("NaN in a key", k_with_nan)):
        exact = _reference(q, keys, v, key, LENGTHS[seq_layout])
        tensors = [x.unflatten(0, (len(lens_q), -1)) if is_dense else x for x in (q, keys, v)]
        for packing in (Packing.NEVER, Packing.ALWAYS):
            problem = _problem(key, dtype, seq_layout, packing, num_sms)
            yield ServedCall(f"{name}, heads packed {packing.name.lower()}", problem, *tensors, cu_seqlens, exact)


def _cumulative(lens: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)


def _mask(key: TileKey) -> MaskSpec:
    return MaskSpec(key.mask, WINDOW_LEFT, 0) if key.mask is Mask.LOCAL else whole_mask(key.mask)


def _problem(key: TileKey, dtype: Dtype, seq_layout: SeqLayout, packing: Packing, num_sms: int) -> ForwardProblem:
    lens_q, lens_k = zip(*LENGTHS[seq_layout], strict=True)
    return ForwardProblem(
        dtype=dtype,
        batch=len(lens_q),
        max_seqlen_q=max(lens_q),
        max_seqlen_k=max(lens_k),
        heads_q=HEADS,
        heads_kv=KV_HEADS,
        head_dim=key.head_dim,
        head_dim_v=key.head_dim_v,
        mask=_mask(key),
        score=key.score,
        seq_layout=seq_layout,
        num_sms=num_sms,
        packing=packing,
    )


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: TileKey, lengths: tuple[tuple[int, int], ...]
) -> Reference:
    """Of sequences one behind the other, float64. q: (total_q, heads, head_dim); k, v: (total_k, kv_heads, ...)."""
    outs, lses = [], []
    lens_q, lens_k = (list(lens) for lens in zip(*lengths, strict=True))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    parts = (x.double().split(lens) for x, lens in ((q, lens_q), (k, lens_k), (v, lens_k)))
    for sequence in zip(*parts, strict=True):
        heads = [attend(*(x[:, head] for x in sequence), _mask(key), softcap_of(key.score)) for head in range(HEADS)]
        out, lse = (torch.stack(part, dim=1) for part in zip(*heads, strict=True))
        outs.append(out)
        lses.append(lse)
    return Reference(torch.cat(outs), torch.cat(lses))


def what_is_wrong(out: torch.Tensor, lse: torch.Tensor, call: ServedCall) -> str | None:
    """What is wrong with a call's results, which were full of NaN before, or None."""
    exact = call.exact
    out = out.double().reshape(exact.out.shape)
    lse = lse.double().transpose(-1, -2).reshape(exact.lse.shape)
    for name, found, expected in (("out", out, exact.out), ("lse", lse, exact.lse)):
        if not torch.equal(found.isnan(), expected.isnan()):
            return f"{name} is NaN in other rows than it should be"
    is_number = ~exact.lse.isnan()
    errors, sizes = (x.norm(dim=-1)[is_number] for x in (out - exact.out, exact.out))
    wrong = int((errors > LARGEST_ROW_ERROR * sizes).sum())
    if wrong:
        return f"{wrong} of {sizes.numel()} rows of out are wrong"
    lse, expected = lse[is_number], exact.lse[is_number]
    wrong = int(((lse != expected) & ~((lse - expected).abs() <= LARGEST_LSE_ERROR)).sum())
    return f"the log-sum-exp of {wrong} of {lse.numel()} rows is wrong" if wrong else None
