"""Rows, keys and sequences that do not exist: nothing of them may reach the output (N1 to N5, N7 to N9)."""

from __future__ import annotations

import pytest
import torch

from .cases import CAUSAL, KERNEL_MASKS, WINDOW, Case, each
from .harness import POISONS, check, make_tensors, poisoned_allocations, reference, run

HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (64, 512)]


def test_poisoned_allocations_are_nan() -> None:
    """The other tests rely on it."""
    with poisoned_allocations():
        assert torch.empty(1000, device="cuda").isnan().all()
        assert torch.empty_like(torch.zeros(1000, device="cuda", dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("poison", POISONS)
@each(
    Case(d, dv, lens_q=(100, 64), lens_k=(300, 128), used_k=(129, 65), **mask.options)
    for d, dv in HEAD_DIMS
    for mask in KERNEL_MASKS
)
def test_n1_keys_beyond_seqused(case: Case, poison: float) -> None:
    """N1: rows of K and V beyond seqused_k hold NaN or infinity."""
    tensors = make_tensors(case)
    for rows in (tensors.k, tensors.v):
        rows[129:300] = poison
        rows[300 + 65 :] = poison
    check(case, tensors, *run(case, tensors))


@each(Case(d, dv, batch=3, seqlen_q=100, seqlen_k=77, **mask.options) for d, dv in HEAD_DIMS for mask in KERNEL_MASKS)
def test_n1_memory_around_the_tensors(case: Case) -> None:
    """N1: rows before, between and after the sequences, heads and columns beside them, are all NaN."""
    tensors = make_tensors(case)
    for name in ("q", "k", "v"):
        inner = getattr(tensors, name)
        b, s, h, d = inner.shape
        outer = torch.full((b + 2, s + 70, h + 2, d + 16), float("nan"), dtype=case.dtype, device="cuda")
        view = outer[1 : b + 1, 35 : s + 35, 1 : h + 1, 8 : d + 8]
        view.copy_(inner)
        setattr(tensors, name, view)
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, dv, batch=1, heads_q=2, seqlen_q=sq, seqlen_k=sk, **mask.options)
    for d, dv in HEAD_DIMS
    for mask in (CAUSAL, WINDOW)
    for sq, sk in [(300, 5), (257, 128)]
)
def test_n2_rows_without_a_key(case: Case) -> None:
    """N2: out 0 and LSE -inf, not NaN and no finite LSE."""
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    check(case, tensors, out, lse)
    hidden = lse.isneginf()
    assert hidden.any() and not hidden.all()
    assert not out.transpose(1, 2)[hidden].any()


@pytest.mark.parametrize("score", [-5e4, -1e6, 5e4])
@each(Case(d, batch=1, seqlen_q=3, seqlen_k=1, heads_q=1, heads_kv=1, softmax_scale=1.0) for d in (64, 128, 256))
def test_n2_a_single_key_with_an_extreme_score(case: Case, score: float) -> None:
    """N2: a finite stand-in for minus infinity would turn this row into zeros."""
    tensors = make_tensors(case)
    tensors.q.zero_()[..., 0] = 1024.0
    tensors.k.zero_()[..., 0] = score / 1024.0
    out, lse = run(case, tensors)
    assert torch.equal(out, tensors.v.expand_as(out))
    torch.testing.assert_close(lse.double(), reference(case, tensors)[1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shift", [-100.0, -1000.0])
@each(
    Case(
        d, lens_q=(70,) * 177, lens_k=tuple(range(100, 277)), heads_q=1, heads_kv=1, softmax_scale=0.125, **mask.options
    )
    for d in (64, 128, 256)
    for mask in KERNEL_MASKS
)
def test_n3_n4_strongly_negative_scores(case: Case, shift: float) -> None:
    """N3, N4: all scores near -100 or -1000, every residue of the key tile: the zeros past the end must not win."""
    tensors = make_tensors(case)
    magnitude = (abs(shift) / case.scale) ** 0.5
    tensors.q[..., 0], tensors.k[..., 0] = magnitude, -magnitude
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, seqlen_q=100, seqlen_k=sk, softmax_scale=0.125, **mask.options)
    for d in (64, 128)
    for mask in KERNEL_MASKS
    for sk in (1, 65, 129, 200)
)
def test_n4_strongly_negative_scores_dense(case: Case) -> None:
    tensors = make_tensors(case)
    tensors.q[..., 0], tensors.k[..., 0] = 90.0, -90.0
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, dv, **lengths, **mask.options)
    for d, dv in [(64, 64), (128, 128), (256, 256), (64, 512)]
    for mask in KERNEL_MASKS
    for lengths in [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0}]
)
def test_n5_empty_dense(case: Case) -> None:
    """N5: no sequence, no query or no key at all."""
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    assert out.shape == (case.batch, case.seqlen_q, case.heads_q, case.dv)
    assert lse.shape == (case.batch, case.heads_q, case.seqlen_q)
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.isneginf().all()


@each(
    Case(d, lens_q=lens_q, lens_k=lens_k, **mask.options)
    for d in (64, 256)
    for mask in KERNEL_MASKS
    for lens_q, lens_k in [((), ()), ((0, 0), (0, 0)), ((0, 0), (5, 70)), ((5, 70), (0, 0)), ((0,), (3,)), ((3,), (0,))]
)
def test_n5_empty_varlen(case: Case) -> None:
    """N5: total_q or total_k is zero."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, dv, lens_q=lens_q, lens_k=lens_k, heads_kv=1, **mask.options)
    for d, dv in [(64, 64), (128, 128), (256, 256), (64, 512)]
    for mask in KERNEL_MASKS
    for lens_q, lens_k in [
        ((0, 0, 200), (0, 0, 300)),
        ((200, 0, 0), (300, 0, 0)),
        ((0, 130, 0, 1), (128, 0, 0, 1)),
        ((5,) + (0,) * 200 + (70,), (9,) + (0,) * 200 + (80,)),
        ((5,) * 201, (0,) * 200 + (80,)),
    ]
)
def test_n7_n9_zero_lengths_on_both_sides(case: Case) -> None:
    """N7, N9, R7: no queries but keys, no keys but queries, and long runs of both; all output is written."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, lens_q=lens_q, lens_k=(0, 1, 0, 33), heads_q=8, heads_kv=2, causal=causal)
    for d in (64, 128, 256)
    for causal in (False, True)
    for lens_q in [(0, 1, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0), (0, 0, 0, 1)]
)
def test_n8_at_most_one_query(case: Case) -> None:
    """N8: max_seqlen_q is 0 or 1."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, dv, lens_q=(100, 200), lens_k=(150, 250), used_q=used, used_k=(0, 250), **mask.options)
    for d, dv in [(64, 64), (256, 256)]
    for mask in KERNEL_MASKS
    for used in [(0, 0), (0, 200), (100, 0), (1, 129)]
)
def test_n9_rows_past_seqused_are_not_written(case: Case) -> None:
    """N9: seqused of zero on either side; what does not exist keeps its poison, what exists is written."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))
