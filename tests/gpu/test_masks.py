"""Which keys a query sees, read off the kernels exactly (W1 to W5), and equal masks spelled differently."""

from __future__ import annotations

import itertools

import torch

import flash_attn_interface

from .cases import CAUSAL, Case, MaskOptions, each
from .harness import Tensors, check, make_tensors, poisoned_allocations, run, sm_margin

#: (left, right) windows: each side unlimited, zero, within a tile, about a tile, over a tile, beyond every key.
WINDOWS = [
    *((-1, -1), (-1, 0), (0, -1), (0, 0), (1, 0), (0, 1), (5, 3), (-1, 17), (17, -1)),
    *((127, 128), (128, 127), (200, 0), (0, 200), (333, -1), (5000, 5000), (40, 5000), (5000, 40)),
]
LEFT = MaskOptions("left", window_size=(50, -1))
AROUND = MaskOptions("around", window_size=(9, 9))
LENGTHS = [(1, 1), (1, 200), (130, 1), (64, 64), (127, 257), (257, 127), (300, 300), (200, 520), (520, 200)]


def _expected_visibility(case: Case) -> torch.Tensor:
    """The definition, entry by entry: bool (seqlen_q, seqlen_k)."""
    left, right = case.window_size
    rows = []
    for i in range(case.seqlen_q):
        position = i + case.seqlen_k - case.seqlen_q
        first = 0 if left < 0 else position - left
        last = case.seqlen_k - 1 if right < 0 else position + right
        if case.causal:
            last = min(last, position)
        if case.attention_chunk:
            chunk = position // case.attention_chunk
            first = max(first, chunk * case.attention_chunk)
            last = min(last, (chunk + 1) * case.attention_chunk - 1)
        rows.append([first <= j <= last for j in range(case.seqlen_k)])
    return torch.tensor(rows, dtype=torch.bool)


def _seen_keys(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(visibility, lse) as the kernel has them, for one head of one sequence.

    q = 0 makes all weights of a row equal, so the output is the mean of the visible rows of v. v's rows are unit
    vectors, dv keys at a time, so a column of the output is positive exactly where its key is seen.
    """
    dv = case.dv
    q = torch.zeros(1, case.seqlen_q, 1, case.head_dim, dtype=case.dtype, device="cuda")
    k = torch.randn(1, case.seqlen_k, 1, case.head_dim, device="cuda").to(case.dtype)
    seen = []
    for first in range(0, case.seqlen_k, dv):
        keys = min(dv, case.seqlen_k - first)
        v = torch.zeros(1, case.seqlen_k, 1, dv, dtype=case.dtype, device="cuda")
        v[0, first : first + keys, 0, :keys] = torch.eye(keys, dtype=case.dtype, device="cuda")
        out, lse = run(case, Tensors(q, k, v))
        assert not out.isnan().any()
        seen.append(out[0, :, 0, :keys] > 0)
    return torch.cat(seen, dim=1), lse[0, 0]


def _assert_sees_exactly_the_right_keys(case: Case) -> None:
    seen, lse = _seen_keys(case)
    expected = _expected_visibility(case).to(seen.device)
    wrong = (seen != expected).nonzero()
    assert not wrong.numel(), f"{len(wrong)} (query, key) pairs are wrong, first {wrong[0].tolist()}"
    torch.testing.assert_close(lse, expected.sum(1).float().log(), rtol=1e-6, atol=1e-6)


def _mask_cases() -> list[Case]:
    """Every window at two lengths, the lengths going round; kernels with different tiles."""
    lengths = itertools.cycle(LENGTHS)
    return [
        Case(d, dv, batch=1, heads_q=1, heads_kv=1, seqlen_q=sq, seqlen_k=sk, causal=causal, window_size=window)
        for (d, dv), window, causal in itertools.product([(64, 64), (128, 128), (256, 256)], WINDOWS, (False, True))
        for sq, sk in [next(lengths), next(lengths)]
    ]


def _chunk_cases() -> list[Case]:
    options = itertools.product((1, 7, 64, 100, 128, 1000), (False, True), [(-1, -1), (20, 0), (50, 30)])
    lengths = itertools.cycle(LENGTHS)
    return [
        Case(
            d,
            batch=1,
            heads_q=1,
            heads_kv=1,
            seqlen_q=sq,
            seqlen_k=sk,
            attention_chunk=chunk,
            causal=causal,
            window_size=window,
        )
        for (chunk, causal, window), d in itertools.product(options, (64, 128))
        for sq, sk in [next(lengths)]
    ]


@each(_mask_cases())
def test_window_sees_exactly_the_right_keys(case: Case) -> None:
    """W1 (right window with sq > sk), W3 (inclusive bounds), W5 (bottom-right alignment)."""
    _assert_sees_exactly_the_right_keys(case)


@each(_chunk_cases())
def test_chunk_sees_exactly_the_right_keys(case: Case) -> None:
    _assert_sees_exactly_the_right_keys(case)


@each([Case(64, seqlen_q=90, seqlen_k=60, window_size=(20, -1)), Case(64, seqlen_q=90, seqlen_k=60)])
def test_unlimited_and_listed_windows(case: Case) -> None:
    """W2: a tuple, a list and a tensor mean the same; -1 and None both limit nothing."""
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    check(case, tensors, out, lse)
    without_minus_one = tuple(None if side < 0 else side for side in case.window_size)
    for window in (list(case.window_size), torch.tensor(case.window_size), without_minus_one):
        other_out, other_lse = run(case, tensors, window_size=window)
        assert torch.equal(out, other_out)
        assert torch.equal(lse, other_lse)


@each(Case(128, seqlen_q=sq, seqlen_k=sk, causal=True) for sq, sk in [(200, 200), (100, 300), (300, 100)])
def test_causal_is_the_window_without_right_side(case: Case) -> None:
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    window_out, window_lse = run(case, tensors, causal=False, window_size=(-1, 0))
    assert torch.equal(out, window_out)
    assert torch.equal(lse, window_lse)


@each(Case(d, seqlen_q=300, seqlen_k=4096, window_size=(333, right)) for d in (64, 128, 256) for right in (-1, 0, 100))
def test_first_query_tile_of_a_left_window(case: Case) -> None:
    """W4: fewer queries than keys, not causal: the first tile's block range."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(Case(d, seqlen_q=500, seqlen_k=77, **mask.options) for d in (64, 128) for mask in (LEFT, AROUND, CAUSAL))
def test_more_queries_than_keys(case: Case) -> None:
    """W1, W5: the first rows stand before the first key."""
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    check(case, tensors, out, lse)
    if case.causal:
        assert not out[:, : 500 - 77].any()
        assert lse[:, :, : 500 - 77].isneginf().all()


@each(
    Case(
        128,
        lens_q=(64, 300, 0, 130),
        lens_k=(200, 150, 40, 1),
        heads_q=1,
        heads_kv=1,
        window_size=window,
        causal=causal,
    )
    for window in [(0, 0), (33, 15), (-1, 40), (500, 0)]
    for causal in (False, True)
)
def test_window_of_each_sequence(case: Case) -> None:
    """W3 with sequences of different lengths: the count of seen keys is exact."""
    tensors = make_tensors(case)
    tensors.q.zero_()
    with poisoned_allocations():
        _, lse = flash_attn_interface.flash_attn_varlen_func(
            tensors.q,
            tensors.k,
            tensors.v,
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            case.max_seqlen_q,
            case.max_seqlen_k,
            causal=case.causal,
            window_size=case.window_size,
            sm_margin=sm_margin(case, tensors),
            return_attn_probs=True,
        )
    counts = torch.cat(
        [
            _expected_visibility(case.replace(seqlen_q=len_q, seqlen_k=len_k)).sum(1)
            for len_q, len_k in zip(case.lens_q, case.lens_k, strict=True)
            if len_q
        ]
    )
    torch.testing.assert_close(lse[0], counts.float().log().cuda(), rtol=1e-6, atol=1e-6)
