"""Sizes at which 32-bit offsets, grid limits and counters overflow (I1, I3, I5)."""

from __future__ import annotations

import pytest
import torch

from .calls import make_call
from .cases import Case, GradientCase, each
from .harness import Tensors, check, make_tensors, poisoned_allocations, run

pytestmark = pytest.mark.hardware

TWO_GIGA = 2**31


@each(
    [
        Case(72, batch=1600, heads_q=16, heads_kv=16, seqlen_q=729, seqlen_k=729),
        Case(128, batch=8300, heads_q=16, heads_kv=16, seqlen_q=1, seqlen_k=1),
        Case(64, batch=15000, heads_q=8, heads_kv=2, seqlen_q=12, seqlen_k=20, causal=True),
        Case(128, batch=2, heads_q=33000, heads_kv=3, seqlen_q=3, seqlen_k=5),
        GradientCase(72, batch=1600, heads_q=16, heads_kv=16, seqlen_q=729, seqlen_k=729, deterministic=True),
        GradientCase(256, batch=8300, heads_q=16, heads_kv=16, seqlen_q=1, seqlen_k=2, deterministic=True),
        GradientCase(64, batch=15000, heads_q=8, heads_kv=2, seqlen_q=12, seqlen_k=20, causal=True, deterministic=True),
        GradientCase(192, 128, batch=2, heads_q=33000, heads_kv=3, seqlen_q=3, seqlen_k=5, deterministic=True),
    ]
)
def test_i1_many_sequences_and_heads(case: Case, gigabytes) -> None:
    """I1, I5: batch x heads large and beyond 65535; equal sequences give equal bits wherever they stand."""
    rows = case.batch * max(case.seqlen_q, case.seqlen_k) * case.heads_q
    # Gradients, and their sums in fp32, whose sequences are filled up to whole blocks.
    gigabytes(45 if isinstance(case, GradientCase) else 4 * rows * case.head_dim * 2 / 1e9 + 4)
    period = min(case.batch, 7)
    first = make_call(case.replace(batch=period))
    index = torch.arange(case.batch, device="cuda") % period
    results = first.map(lambda x: x[index], case).run()
    first.check(tuple(x[:period] for x in results))
    for begin in range(0, case.batch, period):
        count = min(period, case.batch - begin)
        for number, x in enumerate(results):
            assert torch.equal(x[begin : begin + count], x[:count]), f"result {number} of sequences from {begin} on"


@pytest.mark.parametrize("rows_past_the_limit", [-1, 0, 200])
@each([Case(128, batch=1, heads_q=16, heads_kv=1, seqlen_q=TWO_GIGA // (16 * 128), seqlen_k=64)])
def test_i3_q_and_out_of_two_giga_elements(case: Case, rows_past_the_limit: int, gigabytes) -> None:
    """I3: q and out just below, at and just above 2**31 elements."""
    gigabytes(24)
    case = case.replace(seqlen_q=case.seqlen_q + rows_past_the_limit)
    tensors = make_tensors(case.replace(seqlen_q=1000))
    small_q = tensors.q
    tensors.q = small_q[:, torch.arange(case.seqlen_q, device="cuda") % 1000]
    out, lse = run(case, tensors)
    for begin in (0, case.seqlen_q // 2 // 1000 * 1000, (case.seqlen_q - 1) // 1000 * 1000 - 1000):
        window = slice(begin, begin + 1000)
        part = Tensors(small_q, tensors.k, tensors.v)
        check(case.replace(seqlen_q=1000), part, out[:, window].contiguous(), lse[:, :, window].contiguous())
    assert not out[0, -1000:].isnan().any()
    assert torch.equal(out[0, -1], out[0, (case.seqlen_q - 1) % 1000])


@pytest.mark.parametrize("rows_past_the_limit", [-1, 0, 200])
@each([Case(128, batch=1, heads_q=16, heads_kv=16, seqlen_q=64, seqlen_k=TWO_GIGA // (16 * 128))])
def test_i3_k_and_v_of_two_giga_elements(case: Case, rows_past_the_limit: int, gigabytes) -> None:
    """I3: each query row finds its own key among a million, the last ones beyond 2**31 elements."""
    gigabytes(24)
    seqlen_k = case.seqlen_k + rows_past_the_limit
    case = case.replace(seqlen_k=seqlen_k)
    shape = (1, seqlen_k, case.heads_kv, case.head_dim)
    k = torch.zeros(shape, dtype=case.dtype, device="cuda")
    v = torch.empty(shape, dtype=case.dtype, device="cuda").normal_()
    q = torch.zeros(1, case.seqlen_q, case.heads_q, case.head_dim, dtype=case.dtype, device="cuda")
    row = torch.arange(case.seqlen_q, device="cuda")
    # Row i carries feature i, which only its target key has: a score of 90 against 0 for all others.
    targets = seqlen_k - 1 - row * (seqlen_k // 100)
    q[0, row, :, row] = 32.0
    k[0, targets, :, row] = 32.0
    out, _ = run(case, Tensors(q, k, v), softmax_scale=90 / 1024)
    assert torch.equal(out[0], v[0, targets])


@each([Case(64, batch=2, heads_q=2, heads_kv=2, seqlen_q=100, seqlen_k=130)])
def test_i3_strides_of_two_giga_elements(case: Case, gigabytes) -> None:
    """I3: the second sequence of q, k and v lies 2**31 + 64 elements behind the first."""
    gigabytes(20)
    tensors = make_tensors(case)
    storage = torch.empty(TWO_GIGA + 2**22, dtype=case.dtype, device="cuda")
    for number, name in enumerate(("q", "k", "v")):
        inner = getattr(tensors, name)
        strides = (TWO_GIGA + 64, *inner.stride()[1:])
        view = storage.as_strided(inner.shape, strides, storage_offset=number * 2**20)
        view.copy_(inner)
        setattr(tensors, name, view)
    check(case, tensors, *run(case, tensors))


@each([Case(8, batch=1, heads_q=2**13, heads_kv=1, seqlen_q=2**18 + 64, seqlen_k=16)])
def test_i3_lse_of_more_than_two_giga_elements(case: Case, gigabytes) -> None:
    """I3: 2**31 rows of LSE; q is one row seen through strides of zero."""
    gigabytes(50)
    row = torch.randn(1, 1, 1, case.head_dim, device="cuda").to(case.dtype)
    q = row.expand(1, case.seqlen_q, case.heads_q, case.head_dim)
    small = make_tensors(case.replace(seqlen_q=1, heads_q=1))
    with poisoned_allocations():
        out, lse = run(case, Tensors(q, small.k, small.v))
    check(case.replace(seqlen_q=1, heads_q=1), Tensors(row, small.k, small.v), out[:, -1:, -1:], lse[:, -1:, -1:])
    for head in range(0, case.heads_q, 512):
        part = slice(head, head + 512)
        assert (lse[:, part] == lse[0, 0, 0]).all()
        assert (out[:, :, part] == out[0, 0, 0]).all()


@each(
    [
        Case(64, batch=1, heads_q=2, heads_kv=1, seqlen_q=64, seqlen_k=2**22 + 1, causal=True),
        Case(64, batch=1, heads_q=1, heads_kv=1, seqlen_q=2**22 + 1, seqlen_k=2**22 + 1, window_size=(100, 0)),
    ]
)
def test_i2_four_million_keys(case: Case, gigabytes) -> None:
    """I2: sequence lengths beyond 2**22."""
    gigabytes(16)
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    if case.seqlen_q == 64:
        check(case, tensors, out, lse)
        return
    # Under the window, the last rows see the last keys alone.
    tail = Tensors(tensors.q[:, -500:], tensors.k[:, -600:], tensors.v[:, -600:])
    check(case.replace(seqlen_q=500, seqlen_k=600), tail, out[:, -500:], lse[:, :, -500:])
    assert not out.isnan().any()
