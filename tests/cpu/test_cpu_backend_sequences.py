"""The CPU back end on rows without a key, on memory that is not part of a call, and on sequences of any length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_calls import MASKS, ZERO_LENGTHS, check, forward, offsets, random_qkv
from reference import FULL, AttentionOptions, Sequences, assert_attention_close, visible_pairs

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        (AttentionOptions(causal=True), (300, 40)),
        (AttentionOptions(window_size=(5, 7)), (300, 40)),
        (AttentionOptions(causal=True, attention_chunk=16), (300, 40)),
        (AttentionOptions(attention_chunk=16), (300, 40)),
        (FULL, (5, 0)),
        (AttentionOptions(causal=True), (5, 0)),
        (AttentionOptions(window_size=(0, 3), softcap=2.0), (5, 0)),
    ],
)
def test_rows_without_a_key_are_zero_with_lse_minus_infinity(options, lengths):
    """N2, N5, N9: exactly 0 and -inf, in tiles with other rows and in tiles of their own."""
    q, k, v = random_qkv(lengths, heads=(4, 2), batch=2)
    out, lse = forward(q, k, v, options)
    empty = ~visible_pairs(options, range(lengths[0]), *lengths).any(-1)
    assert empty.any()
    assert (out[:, empty] == 0).all()
    assert (lse[:, :, empty] == -INF).all()
    assert torch.isfinite(lse[:, :, ~empty]).all()
    assert_attention_close(out, lse, q, k, v, options)


def test_one_visible_key_with_a_very_low_score():
    """N2: a finite stand-in for -inf would turn such a row into zeros."""
    q, k, v = random_qkv((40, 40))
    q[:], k[:] = 512.0, -512.0  # q.k = -2^24
    out, lse = forward(q, k, v, AttentionOptions(causal=True, window_size=(0, 0), softmax_scale=1.0))
    assert torch.equal(out, v.expand_as(out))
    assert (lse == -(2.0**24)).all()


@pytest.mark.parametrize("shift", [-100.0, -1000.0])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_strongly_negative_scores_beside_the_tail(shift, causal):
    """N3, N4: keys past the end have score 0 in a kernel; they must win neither the maximum nor the sum."""
    for len_k in (1, 15, 16, 17, 127, 128, 129, 175, 176, 177, 191, 193):
        q, k, v = random_qkv((30, len_k))
        q[..., 0], k[..., 0] = 32.0, shift / 4  # adds shift to every score of scale 1 / 8
        check(q, k, v, AttentionOptions(causal=causal))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_unused_rows_change_nothing(mask, poison):
    """N1: poison past seqused and past the last segment, in q, k and v; and nothing is written there."""
    q, k, v = random_qkv((200, 260), heads=(4, 2), packed=True)
    sequences = Sequences([0, 60, 60, 180], [0, 100, 130, 250], seqused_q=[41, 0, 120], seqused_k=[77, 30, 0])
    clean = forward(q, k, v, MASKS[mask], sequences)
    unused_q = torch.ones(200, dtype=torch.bool)
    unused_k = torch.ones(260, dtype=torch.bool)
    for rows in (slice(0, 41), slice(60, 180)):
        unused_q[rows] = False
    for keys in (slice(0, 77), slice(100, 130)):
        unused_k[keys] = False
    q[unused_q], k[unused_k], v[unused_k] = poison, poison, poison
    out, lse = forward(q, k, v, MASKS[mask], sequences)
    torch.testing.assert_close((out, lse), clean, rtol=0.0, atol=0.0, equal_nan=True)
    assert out[unused_q].isnan().all() and lse[:, unused_q].isnan().all()
    assert torch.isfinite(out[~unused_q]).all()
    assert (lse[:, 60:180] == -INF).all(), "the third sequence has queries and no keys"


def test_dense_tensors_with_used_lengths():
    """N1 for seqused without cu_seqlens; lengths outside [0, seqlen] are cut to it."""
    q, k, v = random_qkv((90, 200), heads=(4, 2), batch=4)
    sequences = Sequences(seqused_q=[90, 1000, 13, 0], seqused_k=[200, 130, -3, 10**6])
    k[1, 130:], v[1, 130:], k[2], v[2], q[2, 13:], q[3] = NAN, NAN, NAN, NAN, NAN, NAN
    check(q, k, v, AttentionOptions(causal=True), sequences)


def test_nan_in_a_used_row_reaches_its_readers_only():
    q, k, v = random_qkv((150, 150), heads=(2, 2))
    q[0, 20, 0] = NAN
    out, lse = forward(q, k, v)
    assert out[0, 20, 0].isnan().all() and lse[0, 0, 20].isnan()
    assert torch.isnan(out).sum() == 64 and torch.isnan(lse).sum() == 1


@pytest.mark.parametrize(("lengths_q", "lengths_k"), ZERO_LENGTHS.values(), ids=ZERO_LENGTHS)
@pytest.mark.parametrize("mask", ["full", "causal", "chunk"])
def test_zero_length_sequences(mask, lengths_q, lengths_k):
    """N5, N6, N7, N8, N9: zero lengths anywhere, on either side, with GQA; out and lse start as NaN."""
    tensors = random_qkv((sum(lengths_q), sum(lengths_k)), heads=(6, 2), packed=True)
    check(*tensors, MASKS[mask], Sequences(offsets(lengths_q), offsets(lengths_k)))


def test_empty_batch():
    """N5."""
    check(*random_qkv((8, 8), batch=0))
    check(*random_qkv((0, 0), packed=True), sequences=Sequences([0], [0]))


@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences_equal_dense_ones(mask):
    q, k, v = random_qkv((77, 150), heads=(4, 2), batch=3)
    dense_out, dense_lse = forward(q, k, v, MASKS[mask])
    cu_seqlens_q, cu_seqlens_k = offsets([77] * 3), offsets([150] * 3)
    for sequences in (
        Sequences(cu_seqlens_q, cu_seqlens_k),
        Sequences(cu_seqlens_q=cu_seqlens_q),
        Sequences(cu_seqlens_k=cu_seqlens_k),
    ):
        packed_q = q if sequences.cu_seqlens_q is None else q.flatten(0, 1)
        packed_kv = (k, v) if sequences.cu_seqlens_k is None else (k.flatten(0, 1), v.flatten(0, 1))
        out, lse = forward(packed_q, *packed_kv, MASKS[mask], sequences)
        torch.testing.assert_close(out.reshape(q.shape), dense_out)
        lse = lse if lse.dim() == 3 else lse.unflatten(1, (3, 77)).transpose(0, 1)
        torch.testing.assert_close(lse, dense_lse)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=5),
    data=st.data(),
)
def test_random_batches(lengths, data):
    lengths_q, lengths_k = ([pair[side] for pair in lengths] for side in (0, 1))
    used = st.one_of(st.none(), st.lists(st.integers(-1, 160), min_size=len(lengths), max_size=len(lengths)))
    sequences = Sequences(offsets(lengths_q), offsets(lengths_k), data.draw(used), data.draw(used))
    options = data.draw(st.sampled_from(list(MASKS.values())))
    check(*random_qkv((sum(lengths_q), sum(lengths_k)), heads=(3, 1), packed=True), options, sequences)
