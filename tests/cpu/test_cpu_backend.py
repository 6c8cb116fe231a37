"""The CPU back end's numbers against the float64 reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_calls import DTYPES, MASKS, check, forward, random_qkv
from reference import AttentionOptions, attention

HEAD_DIMS = [(d, d) for d in (8, 40, 64, 72, 96, 128, 192, 256)] + [(192, 128), (64, 256), (64, 512)]
#: (seqlen_q, seqlen_k): off every tile size, both longer and shorter queries.
LENGTHS = [
    (1, 1),
    (1, 239),
    (3, 799),
    (64, 128),
    (113, 203),
    (128, 217),
    (256, 512),
    (239, 1),
    (799, 3),
    (108, 256),
    (384, 255),
    (192, 177),
]


@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["scaled", "softcap"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths, mask, softcap):
    options = dataclasses.replace(MASKS[mask], softcap=softcap)
    check(*random_qkv(lengths, heads=(2, 1)), options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal", "window", "chunk"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(head_dims, mask, dtype):
    check(*random_qkv((113, 203), head_dims=head_dims, dtype=DTYPES[dtype]), MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 6, 8, 16])
def test_query_heads_per_kv_head(ratio, mask, dtype):
    """Two kv heads, so that a wrong grouping of the query heads shows."""
    check(*random_qkv((65, 130), heads=(2 * ratio, 2), batch=2, dtype=DTYPES[dtype]), MASKS[mask])


@settings(max_examples=500)
@given(
    lengths=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    heads_kv=st.integers(1, 2),
    ratio=st.integers(1, 3),
    batch=st.integers(1, 2),
    head_dims=st.sampled_from([(16, 16), (64, 64), (72, 72), (64, 256)]),
    dtype=st.sampled_from(list(DTYPES.values())),
    options=st.builds(
        AttentionOptions,
        softmax_scale=st.sampled_from([None, 0.02, 0.5]),
        causal=st.booleans(),
        window_size=st.tuples(st.integers(-1, 210), st.integers(-1, 210)),
        attention_chunk=st.one_of(st.just(0), st.integers(1, 210)),
        softcap=st.sampled_from([0.0, 1.0, 30.0]),
    ),
    tile=st.tuples(st.sampled_from([16, 64, 128]), st.sampled_from([16, 48, 80, 176])),
)
def test_every_option_with_every_other(lengths, heads_kv, ratio, batch, head_dims, dtype, options, tile):
    """W6 in spirit: the cross product, with tiles small enough that there are many of them."""
    tensors = random_qkv(lengths, (heads_kv * ratio, heads_kv), head_dims, dtype, batch)
    check(*tensors, options, tile=tile)


def test_large_and_small_scales():
    q, k, v = random_qkv((70, 140))
    for scale in (1e-4, 3.0):
        check(q, k, v, AttentionOptions(softmax_scale=scale, causal=True))


def test_probabilities_are_rounded_to_the_input_type_but_not_their_sum():
    """Two keys with scores 0 and s: out = round(p) / (1 + p) for values 0 and 1."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    q[..., 0], k[0, 1, 0, 0], v[0, 1] = 1.0, -0.3125, 1.0
    out, lse = forward(*(x.bfloat16() for x in (q, k, v)), AttentionOptions(softmax_scale=1.0), out_dtype=torch.float32)
    p = torch.tensor(-0.3125).exp()
    assert p.bfloat16() != p
    torch.testing.assert_close(out[0, 0, 0, 0], p.bfloat16().float() / (1 + p), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(lse[0, 0, 0], torch.log1p(p), rtol=1e-6, atol=0.0)


def test_float64_inputs_are_computed_in_float64():
    q, k, v = random_qkv((113, 203), heads=(4, 2), dtype=torch.float64)
    options = AttentionOptions(causal=True, softcap=3.0)
    out, lse = forward(q, k, v, options)
    expected_out, expected_lse = attention(q, k, v, options)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_strided_inputs():
    """Views of packed qkv (L1) and keys shared by all heads through a stride of 0."""
    qkv = torch.randn(2, 150, 3, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    check(*qkv.unbind(2), AttentionOptions(causal=True))
    q, k, v = qkv.unbind(2)
    check(q, k[:, :, :1].expand(-1, -1, 4, -1), v.transpose(1, 2).contiguous().transpose(1, 2))
