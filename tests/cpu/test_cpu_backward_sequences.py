"""The CPU back end's gradients over sequences of any length, and on memory that is not part of a call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_calls import MASKS, ZERO_LENGTHS, offsets, random_qkv
from flash_attn_3.backward_plan import padded_offset, padded_rows
from gradient_calls import NAN, backward, check, check_exactly, random_gradients
from reference import AttentionOptions, Sequences

INF = float("inf")


@pytest.mark.parametrize(("lengths_q", "lengths_k"), ZERO_LENGTHS.values(), ids=ZERO_LENGTHS)
@pytest.mark.parametrize("mask", ["full", "causal", "chunk"])
def test_zero_length_sequences(mask, lengths_q, lengths_k):
    """N5, N6, N7, N8, N9: zero lengths anywhere, on either side, with GQA; gradients start as NaN."""
    tensors = random_qkv((sum(lengths_q), sum(lengths_k)), heads=(6, 2), packed=True)
    check(*tensors, MASKS[mask], Sequences(offsets(lengths_q), offsets(lengths_k)), with_dlse=True)


@pytest.mark.parametrize("head_dims", [(256, 256), (192, 128)], ids=str)
def test_zero_length_sequences_of_wide_heads(head_dims):
    """N7."""
    sequences = Sequences(offsets([0, 70, 0, 9]), offsets([30, 50, 0, 0]))
    check(*random_qkv((79, 80), heads=(2, 1), head_dims=head_dims, packed=True), sequences=sequences)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_unused_rows_change_nothing_and_have_gradient_0(mask, poison):
    """N1, N11: poison past seqused and past the last segment, in q, k, v, dout and dlse."""
    q, k, v = random_qkv((200, 260), heads=(4, 2), packed=True)
    sequences = Sequences([0, 60, 60, 180], [0, 100, 130, 250], seqused_q=[41, 0, 120], seqused_k=[77, 30, 0])
    dout, dlse = random_gradients(q, v)
    clean = backward(q, k, v, dout, dlse, MASKS[mask], sequences)
    unused_q, unused_k = torch.ones(200, dtype=torch.bool), torch.ones(260, dtype=torch.bool)
    for rows in (slice(0, 41), slice(60, 180)):
        unused_q[rows] = False
    for keys in (slice(0, 77), slice(100, 130)):
        unused_k[keys] = False
    q[unused_q], dout[unused_q], k[unused_k], v[unused_k], dlse[:, unused_q] = (poison,) * 5
    dq, dk, dv = backward(q, k, v, dout, dlse, MASKS[mask], sequences)
    for gradient, expected in zip((dq, dk, dv), clean, strict=True):
        assert torch.equal(gradient, expected)
    assert (dq[unused_q] == 0).all() and (dk[unused_k] == 0).all() and (dv[unused_k] == 0).all()


@pytest.mark.parametrize("spare", [2, 130])
def test_spare_rows_after_the_last_sequence(spare):
    """N11: longer tensors than the last offset says; the gradients of the rest are 0, not what memory held."""
    q, k, v = (
        torch.cat([x, torch.full_like(x[:1], NAN).expand(spare, -1, -1)]) for x in random_qkv((90,) * 2, packed=True)
    )
    dout, _ = random_gradients(q, v)
    dq, dk, dv = backward(
        q, k, v, dout, options=AttentionOptions(causal=True), sequences=Sequences([0, 50, 90], [0, 50, 90])
    )
    for gradient in (dq, dk, dv):
        assert (gradient[90:] == 0).all() and torch.isfinite(gradient).all() and (gradient[:90] != 0).any()


def test_dense_tensors_with_used_lengths():
    """W6: seqused without cu_seqlens counts, with a softcap, too; lengths outside [0, seqlen] are cut to it."""
    q, k, v = random_qkv((90, 200), heads=(4, 2), batch=4, dtype=torch.float64)
    sequences = Sequences(seqused_q=[90, 1000, 13, 0], seqused_k=[200, 130, -3, 10**6])
    for options in (AttentionOptions(causal=True), AttentionOptions(softcap=1.5, window_size=(30, 3))):
        check_exactly(q, k, v, options, sequences)


@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences_equal_dense_ones(mask):
    q, k, v = random_qkv((77, 150), heads=(4, 2), batch=3)
    dout, dlse = random_gradients(q, v)
    expected = backward(q, k, v, dout, dlse, MASKS[mask])
    cu_seqlens_q, cu_seqlens_k = offsets([77] * 3), offsets([150] * 3)
    for sequences in (
        Sequences(cu_seqlens_q, cu_seqlens_k),
        Sequences(cu_seqlens_q=cu_seqlens_q),
        Sequences(cu_seqlens_k=cu_seqlens_k),
    ):
        packed = [q, k, v, dout, dlse]
        if sequences.cu_seqlens_q is not None:
            packed[0], packed[3], packed[4] = q.flatten(0, 1), dout.flatten(0, 1), dlse.transpose(0, 1).flatten(1, 2)
        if sequences.cu_seqlens_k is not None:
            packed[1:3] = k.flatten(0, 1), v.flatten(0, 1)
        actual = backward(*packed, MASKS[mask], sequences)
        for gradient, dense in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient.reshape(dense.shape), dense)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), min_size=1, max_size=4),
    data=st.data(),
)
def test_random_batches(lengths, data):
    """W6, N6 to N9, exactly."""
    lengths_q, lengths_k = ([pair[side] for pair in lengths] for side in (0, 1))
    used = st.one_of(st.none(), st.lists(st.integers(-1, 130), min_size=len(lengths), max_size=len(lengths)))
    sequences = Sequences(offsets(lengths_q), offsets(lengths_k), data.draw(used), data.draw(used))
    options = data.draw(st.sampled_from(list(MASKS.values())))
    tensors = random_qkv((sum(lengths_q), sum(lengths_k)), heads=(3, 1), packed=True, dtype=torch.float64)
    check_exactly(*tensors, options, sequences, tile=(data.draw(st.sampled_from([16, 64])), 48))


@settings(max_examples=500)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=20),
    gaps=st.lists(st.integers(0, 3), min_size=21, max_size=21),
    block_m=st.sampled_from([1, 3, 64, 80, 128]),
)
def test_padded_sequences_do_not_overlap(lengths, gaps, block_m):
    """N10, N12: every sequence has whole blocks of its own, whatever lies between the sequences."""
    begin, end = gaps[0], 0
    for sequence, length in enumerate(lengths):
        offset = padded_offset(begin, sequence, block_m)
        assert offset % block_m == 0 and offset >= end
        end = offset + -(-length // block_m) * block_m
        begin += length + gaps[sequence + 1]
    total = padded_rows(begin, len(lengths), block_m)
    assert end <= total and total % block_m == 0
