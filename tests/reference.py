"""Plain attention, and the rules by which a result counts as right. For any device.

The reference materialises scores and masks; it knows nothing of tiles, blocks or row limits, so that it shares
no arithmetic with what it judges. It walks over sequences, kv heads and chunks of query rows, so that long
sequences fit in memory.
"""

from __future__ import annotations

import dataclasses

import torch

#: Most scores that the reference holds at once unless told otherwise (1 GiB in float64).
MAX_SCORES = 2**27
#: Largest 1 - cosine between a result and the exact one. The rounding of P and of the output to 8 bits of
#: mantissa (bf16) leaves about 7e-7; fp16 has 3 bits more, hence 64 times less.
COSINE_TOLERANCE = {torch.bfloat16: 5e-6, torch.float16: 1e-7}
#: Results of fewer numbers have no cosine check: their rounding errors do not average (one row of 16 numbers, a sum
#: of 49 values that nearly cancel, was right and 5.7e-6 away).
MIN_COSINE_NUMBERS = 256


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What defines a call beside its tensors; names and defaults are those of the public functions."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0


FULL = AttentionOptions()


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Segments and used lengths of a variable-length call, as lists of ints; None where the call has none."""

    cu_seqlens_q: list[int] | None = None
    cu_seqlens_k: list[int] | None = None
    seqused_q: list[int] | None = None
    seqused_k: list[int] | None = None


DENSE = Sequences()


def visible_pairs(
    options: AttentionOptions, rows: range, len_q: int, len_k: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which keys each of the query rows sees, straight from the definition: bool (len(rows), len_k)."""
    position = torch.arange(rows.start, rows.stop, device=device)[:, None] + (len_k - len_q)
    key = torch.arange(len_k, device=device)[None, :]
    left, right = options.window_size
    visible = torch.ones(len(rows), len_k, dtype=torch.bool, device=device)
    if options.causal:
        visible &= key <= position
    if left >= 0:
        visible &= key >= position - left
    if right >= 0:
        visible &= key <= position + right
    if options.attention_chunk > 0:
        visible &= key // options.attention_chunk == position // options.attention_chunk
    return visible


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions = FULL,
    sequences: Sequences = DENSE,
    compute_dtype: torch.dtype = torch.float64,
    max_scores: int = MAX_SCORES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition.

    Args:
        q: (b, sq, h, d), or (total_q, h, d) if `sequences` has cu_seqlens_q; k, v alike, with hk heads.
        compute_dtype: float64 or float32 for a reference. The inputs' own 16-bit type gives the result of plain
            code at that precision (softmax scale applied to the keys), the yardstick of `forward_tolerance`.
        max_scores: how many scores may exist at once.

    Returns:
        out like q with v's head dim and lse (b, h, sq) or (h, total_q), in compute_dtype. Rows without a visible
        key have out 0 and lse -inf; rows that do not exist are NaN in both.
    """
    out = q.new_full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=compute_dtype)
    lse = q.new_full(q.shape[:-1], float("nan"), dtype=compute_dtype)
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    batch = q.shape[0] if sequences.cu_seqlens_q is None else len(sequences.cu_seqlens_q) - 1
    group = q.shape[-2] // k.shape[-2]
    for index in range(batch):
        in_q = _rows_of(index, q.shape, sequences.cu_seqlens_q, sequences.seqused_q)
        in_k = _rows_of(index, k.shape, sequences.cu_seqlens_k, sequences.seqused_k)
        q_rows, out_rows, lse_rows = q[in_q], out[in_q], lse[in_q]
        k_rows, v_rows = k[in_k].to(compute_dtype), v[in_k].to(compute_dtype)
        len_q, len_k = q_rows.shape[0], k_rows.shape[0]
        chunk = max(1, max_scores // max(1, group * len_k))
        for first in range(0, len_q, chunk):
            rows = range(first, min(first + chunk, len_q))
            tile = slice(rows.start, rows.stop)
            visible = visible_pairs(options, rows, len_q, len_k, q.device)
            for kv_head in range(k.shape[-2]):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                out_rows[tile, heads], lse_rows[tile, heads] = _attend(
                    q_rows[tile, heads].to(compute_dtype),
                    k_rows[:, kv_head],
                    v_rows[:, kv_head],
                    visible,
                    scale,
                    options.softcap,
                )
    return out, lse.transpose(-1, -2)


def _rows_of(
    index: int, shape: torch.Size, cu_seqlens: list[int] | None, seqused: list[int] | None
) -> slice | tuple[int, slice]:
    """Where the existing rows of one sequence are."""
    begin, end = (0, shape[1]) if cu_seqlens is None else (cu_seqlens[index], cu_seqlens[index + 1])
    if seqused is not None:
        end = begin + min(max(seqused[index], 0), end - begin)
    return slice(begin, end) if cu_seqlens is not None else (index, slice(begin, end))


def _attend(
    q: torch.Tensor,  # (m, g, d)
    k: torch.Tensor,  # (n, d)
    v: torch.Tensor,  # (n, dv)
    visible: torch.Tensor,  # (m, n)
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q @ (k * scale).mT  # (m, g, n)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    has_key = visible.any(-1, keepdim=True)
    # Rows without a key keep their scores until they have served: gradients through -inf - -inf would be NaN.
    scores = scores.masked_fill((~visible & has_key)[:, None], float("-inf"))
    probabilities = torch.softmax(scores, -1).masked_fill(~has_key[:, None], 0.0)
    return probabilities @ v, torch.logsumexp(scores, -1).masked_fill(~has_key, float("-inf"))


def forward_tolerance(reference: torch.Tensor, same_precision: torch.Tensor, softcap: float) -> float:
    """The largest |out - reference| that is rounding: what plain code at the same precision may err, and a floor.

    rtol * max|same_precision - reference| + atol with rtol 2 (3 with a softcap) and atol twice the rounding noise
    of one addition and subtraction at that magnitude.

    Args:
        reference: the exact result cast to the input type.
        same_precision: the same computed in the input type.
    """
    noise = _max_abs((reference + 0.3 - 0.3) - reference)
    rtol = 3.0 if softcap > 0.0 else 2.0
    return rtol * _max_abs(same_precision.double() - reference.double()) + 2.0 * noise


def cosine_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in float64: half the squared relative error. 0 for two zero tensors."""
    x, y = x.double().flatten(), y.double().flatten()
    norms = float(x @ x + y @ y)
    return 1.0 - 2.0 * float(x @ y) / norms if norms > 0.0 else 0.0


def assert_same_special_values(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """NaN, +inf and -inf stand in the same places."""
    for kind, is_kind in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = is_kind(actual) != is_kind(expected)
        places = wrong.nonzero().tolist()
        assert not places, f"{name}: {len(places)} places differ in {kind}, first {places[0]}"


def assert_out_close(
    out: torch.Tensor,
    exact: torch.Tensor,
    same_precision: torch.Tensor,
    softcap: float,
    cosine_tolerance: float | None = None,
) -> None:
    """``out`` passes the tolerance rule and the cosine check against the exact result (float64 or float32).

    ``cosine_tolerance`` is that of the dtype unless the caller can name a further source of rounding. Fewer numbers
    than `MIN_COSINE_NUMBERS` have no cosine check.

    All three hold NaN in rows that do not exist, and nowhere else.
    """
    reference = exact.to(out.dtype)
    assert_same_special_values(out, reference, "out")
    exists = ~torch.isnan(exact)
    out, exact, reference, same_precision = (x[exists] for x in (out, exact, reference, same_precision))
    if out.numel() == 0:
        return
    error = _max_abs(out.double() - reference.double())
    allowed = forward_tolerance(reference, same_precision, softcap)
    assert error <= allowed, f"out: largest error {error:.3e}, allowed {allowed:.3e}"
    if out.numel() < MIN_COSINE_NUMBERS:
        return
    distance = cosine_distance(out, exact)
    allowed = COSINE_TOLERANCE[out.dtype] if cosine_tolerance is None else cosine_tolerance
    assert distance <= allowed, f"out: cosine distance {distance:.3e}, allowed {allowed:.3e}"


def assert_lse_close(lse: torch.Tensor, exact: torch.Tensor, atol: float = 1e-5, rtol: float = 2e-6) -> None:
    """fp32 ``lse`` is the exact one up to fp32 rounding of the scores and their sum."""
    assert lse.dtype == torch.float32
    exact = exact.double()
    assert_same_special_values(lse, exact, "lse")
    finite = torch.isfinite(exact)
    excess = (lse.double() - exact).abs()[finite] - (atol + rtol * exact.abs()[finite])
    assert excess.numel() == 0 or excess.max() <= 0, f"lse: error exceeds the tolerance by {float(excess.max()):.3e}"


def assert_attention_close(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions = FULL,
    sequences: Sequences = DENSE,
    compute_dtype: torch.dtype = torch.float64,
    lse_atol: float = 1e-5,
    max_scores: int = MAX_SCORES,
) -> None:
    """``out`` and ``lse`` are the attention of q, k and v: tolerance rule, cosine, special values.

    Rows that do not exist must hold NaN in both, so fill them with NaN before the call under test.
    """
    assert out.dtype == q.dtype
    exact, exact_lse = attention(q, k, v, options, sequences, compute_dtype, max_scores)
    assert (out.shape, lse.shape) == (exact.shape, exact_lse.shape)
    same_precision, _ = attention(q, k, v, options, sequences, q.dtype, max_scores)
    assert_out_close(out, exact, same_precision, options.softcap)
    assert_lse_close(lse, exact_lse, lse_atol)


def _max_abs(x: torch.Tensor) -> float:
    return float(x.abs().max())
