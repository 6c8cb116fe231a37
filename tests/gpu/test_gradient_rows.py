"""Rows, keys and sequences that do not exist, or see nothing: nothing of them may reach a gradient (N1 to N12)."""

from __future__ import annotations

import pytest
import torch

from flash_attn_3.backward_config import BACKWARD_HEAD_DIM_TILES

from .cases import CAUSAL, FULL, KERNEL_MASKS, WINDOW, GradientCase, each
from .gradients import check_case, check_gradients, differentiate, make_incoming
from .harness import make_tensors


@pytest.mark.parametrize("shift", [-100.0, -1000.0])
@each(
    GradientCase(
        d, lens_q=(70,) * 177, lens_k=tuple(range(100, 277)), heads_q=1, heads_kv=1, softmax_scale=0.125, **mask.options
    )
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
)
def test_n3_strongly_negative_scores(case: GradientCase, shift: float) -> None:
    """N3: the weight of a key past the end, exp(0 - LSE), is infinite; every residue of the key tile."""
    tensors = make_tensors(case)
    magnitude = (abs(shift) / case.scale) ** 0.5
    tensors.q[..., 0], tensors.k[..., 0] = magnitude, -magnitude
    for gradient in differentiate(case, tensors, make_incoming(case, tensors)):
        assert gradient.isfinite().all()
    check_case(case, tensors)


@each(
    GradientCase(d, seqlen_q=100, seqlen_k=sk, softmax_scale=0.125, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
    for sk in (2, 65, 129, 200)
)
def test_n3_strongly_negative_scores_dense(case: GradientCase) -> None:
    tensors = make_tensors(case)
    tensors.q[..., 0], tensors.k[..., 0] = 90.0, -90.0
    check_case(case, tensors)


@each(
    GradientCase(d, batch=1, heads_q=2, seqlen_q=sq, seqlen_k=sk, with_dlse=True, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in (CAUSAL, WINDOW)
    for sq, sk in [(300, 5), (257, 128)]
)
def test_n2_rows_without_a_key(case: GradientCase) -> None:
    """N2: gradient 0, also where the gradient of their LSE, which is -inf, is NaN."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    hidden = slice(0, case.seqlen_q - case.seqlen_k - max(case.window_size[1], 0))
    incoming.dlse[:, :, hidden] = float("nan")
    gradients = differentiate(case, tensors, incoming)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, hidden].any()
    check_case(case, tensors)


@each(
    GradientCase(d, batch=1, heads_q=2, seqlen_q=sq, seqlen_k=sk, window_size=window)
    for d in BACKWARD_HEAD_DIM_TILES
    for sq, sk, window in [(5, 700, (3, 3)), (100, 1000, (70, 0)), (64, 513, (1, 0))]
)
def test_keys_that_no_query_sees(case: GradientCase) -> None:
    """W1: their gradients are zero, and written."""
    _, dk, dv = check_case(case, make_tensors(case))
    unseen = slice(0, case.seqlen_k - case.seqlen_q - case.window_size[0])
    assert not dk[:, unseen].any() and not dv[:, unseen].any()


@each(
    GradientCase(d, lens_q=lens_q, lens_k=lens_k, heads_kv=1, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
    for lens_q, lens_k in [
        ((0, 0, 200), (0, 0, 300)),
        ((200, 0, 0), (300, 0, 0)),
        ((0, 130, 0, 1), (128, 0, 0, 2)),
        ((5,) + (0,) * 200 + (70,), (9,) + (0,) * 200 + (80,)),
        ((5,) * 201, (0,) * 200 + (80,)),
        ((0,) * 200 + (80,), (5,) * 201),
    ]
)
def test_n6_n7_n9_zero_lengths_on_both_sides(case: GradientCase) -> None:
    """N6, N7, N9: no queries but keys, no keys but queries, and long runs of both; all gradients are written."""
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, **lengths, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
    for lengths in [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"lens_q": (0, 0), "lens_k": (5, 70)}]
)
def test_n5_empty_calls(case: GradientCase) -> None:
    tensors = make_tensors(case)
    for gradient in differentiate(case, tensors, make_incoming(case, tensors)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@each(
    GradientCase(d, lens_q=(100, 200), lens_k=(150, 250), used_q=used, used_k=(0, 250), **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
    for used in [(0, 0), (0, 200), (100, 0), (1, 129)]
)
def test_n9_rows_past_seqused_have_gradient_zero(case: GradientCase) -> None:
    dq, dk, _ = check_case(case, make_tensors(case))
    assert not dq[case.used_q[0] : 100].any() and not dk[:150].any()


@pytest.mark.parametrize("longest", [100, 5000])
@each(
    GradientCase(
        d,
        lens_q=(100, 0, 257, 1),
        lens_k=(150, 70, 0, 300),
        deterministic=deterministic,
        with_dlse=True,
        **mask.options,
    )
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in (FULL, CAUSAL)
    for deterministic in (False, True)
)
def test_max_seqlen_bounds_no_sequence(case: GradientCase, longest: int) -> None:
    """One that is too small leaves no row out, nobody waiting for a turn, and no gradient unwritten."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    gradients = differentiate(case, tensors, incoming, max_seqlen_q=longest, max_seqlen_k=longest)
    check_gradients(case, tensors, incoming, gradients)


@each(GradientCase(d, lens_q=(5, 70), lens_k=(0, 0)) for d in BACKWARD_HEAD_DIM_TILES)
def test_n5_no_key_at_all(case: GradientCase) -> None:
    """N5: whatever max_seqlen_k says."""
    tensors = make_tensors(case)
    for gradient in differentiate(case, tensors, make_incoming(case, tensors), max_seqlen_k=128):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("heads_kv", [1, 4])
@each(
    GradientCase(d, lens_q=(100, 3, 70), lens_k=(150, 0, 33), spare_q=spare_q, spare_k=spare_k, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
    for spare_q, spare_k in [(2, 130), (130, 2), (0, 1)]
)
def test_n11_rows_past_the_last_sequence_have_gradient_zero(case: GradientCase, heads_kv: int) -> None:
    case = case.replace(heads_kv=heads_kv)
    dq, dk, dv = check_case(case, make_tensors(case))
    assert not any(gradient.isnan().any() for gradient in (dq, dk, dv))
    assert not dq[173:].any() and not dk[183:].any() and not dv[183:].any()


@each(
    GradientCase(d, lens_q=(90, 200), lens_k=(150, 250), heads_q=8, heads_kv=2, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
)
def test_n10_n12_scratch_of_other_calls(case: GradientCase) -> None:
    """N10, N12: scratch holds NaN, then what a call of other lengths left; results are the same to rounding."""
    tensors = make_tensors(case)
    other = case.replace(lens_q=(250, 17), lens_k=(30, 301), seed=1)
    for _ in range(3):
        check_case(case, tensors)
        check_case(other, make_tensors(other))
