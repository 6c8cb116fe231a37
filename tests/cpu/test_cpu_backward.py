"""The CPU back end's gradients: by the tolerance rule in 16 bit, equal to plain attention's in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_calls import DTYPES, MASKS, forward, random_qkv
from gradient_calls import NAN, assert_equal_in_float64, backward, check, check_exactly, random_gradients
from gradient_reference import gradients
from reference import FULL, AttentionOptions, visible_pairs

HEAD_DIMS = [(d, d) for d in (8, 64, 72, 96, 128, 192, 256)] + [(192, 128), (64, 128), (40, 256)]
#: (seqlen_q, seqlen_k): off every tile size, both longer and shorter queries.
LENGTHS = [(1, 1), (1, 239), (3, 399), (64, 128), (113, 203), (128, 217), (239, 1), (399, 3), (108, 256), (255, 192)]


@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["scaled", "softcap"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths, mask, softcap):
    check(*random_qkv(lengths, heads=(2, 1)), dataclasses.replace(MASKS[mask], softcap=softcap), with_dlse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(head_dims, mask, dtype):
    check(*random_qkv((113, 203), head_dims=head_dims, dtype=DTYPES[dtype]), MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 7, 16])
def test_query_heads_per_kv_head(ratio, mask, dtype):
    """L3: two kv heads, so that a wrong grouping of the query heads shows; dk and dv are summed in fp32."""
    check(*random_qkv((65, 130), heads=(2 * ratio, 2), batch=2, dtype=DTYPES[dtype]), MASKS[mask])


@settings(max_examples=300)
@given(
    lengths=st.tuples(st.integers(0, 150), st.integers(0, 150)),
    heads_kv=st.integers(1, 2),
    ratio=st.integers(1, 3),
    batch=st.integers(1, 2),
    head_dims=st.sampled_from([(16, 16), (72, 72), (64, 256), (192, 128)]),
    options=st.builds(
        AttentionOptions,
        softmax_scale=st.sampled_from([None, 0.02, 0.5]),
        causal=st.booleans(),
        window_size=st.tuples(st.integers(-1, 160), st.integers(-1, 160)),
        attention_chunk=st.one_of(st.just(0), st.integers(1, 160)),
        softcap=st.sampled_from([0.0, 1.0, 30.0]),
    ),
    with_dlse=st.booleans(),
    tile=st.tuples(st.sampled_from([16, 64, 128]), st.sampled_from([16, 48, 80, 128])),
)
def test_every_option_with_every_other(lengths, heads_kv, ratio, batch, head_dims, options, with_dlse, tile):
    """W6: the cross product, exactly, with tiles small enough that there are many of them."""
    tensors = random_qkv(lengths, (heads_kv * ratio, heads_kv), head_dims, torch.float64, batch)
    check_exactly(*tensors, options, with_dlse=with_dlse, tile=tile)


class ModelAttention(torch.autograd.Function):
    """The two passes of the CPU back end as one differentiable function, in float64."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return forward(q, k, v, options, tile=(4, 4))

    @staticmethod
    def backward(ctx, dout, dlse):
        dlse = dlse.where(torch.isfinite(dlse), 0.0)
        return *backward(*ctx.saved_tensors, dout, dlse, ctx.options, tile=(4, 4)), None


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["scaled", "softcap"])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "chunk"])
def test_gradcheck(mask, softcap):
    """Against finite differences of the forward model, so that nothing depends on the reference."""
    options = {
        "full": FULL,
        "causal": AttentionOptions(causal=True),
        "window": AttentionOptions(window_size=(3, 1)),
        "chunk": AttentionOptions(attention_chunk=5, causal=True),
    }[mask]
    options = dataclasses.replace(options, softcap=softcap)
    leaves = [x.requires_grad_() for x in random_qkv((10, 13), heads=(2, 1), head_dims=(8, 8), dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: ModelAttention.apply(q, k, v, options), leaves)


# -- rows and keys that see nothing, and extreme scores --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        (AttentionOptions(causal=True), (300, 40)),
        (AttentionOptions(window_size=(5, 7)), (300, 40)),
        (AttentionOptions(window_size=(5, 7)), (40, 300)),
        (AttentionOptions(causal=True, attention_chunk=16), (300, 40)),
        (AttentionOptions(attention_chunk=16, softcap=2.0), (40, 300)),
        (FULL, (5, 0)),
        (FULL, (0, 5)),
        (FULL, (0, 0)),
    ],
)
def test_what_sees_nothing_has_no_gradient(options, lengths):
    """N2, N5, N9: exactly 0, whatever the gradients of a row's constant results are."""
    q, k, v = random_qkv(lengths, heads=(4, 2), batch=2)
    visible = visible_pairs(options, range(lengths[0]), *lengths)
    rows, keys = ~visible.any(1), ~visible.any(0)
    dout, dlse = random_gradients(q, v)
    dlse[..., rows] = NAN
    dq, dk, dv = backward(q, k, v, dout, dlse, options)
    assert (dq[:, rows] == 0).all() and (dk[:, keys] == 0).all() and (dv[:, keys] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in (dq, dk, dv))
    check(q, k, v, options)


@pytest.mark.parametrize("shift", [-100.0, -1000.0])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_strongly_negative_scores_beside_the_tail(shift, causal):
    """N3: a key past the end has score 0, whose probability beside such a log-sum-exp would be infinite."""
    for length in (1, 16, 63, 64, 65, 127, 128, 129, 191, 192):
        q, k, v = random_qkv((length, length))
        q[..., 0], k[..., 0] = 32.0, shift / 4  # adds shift to every score of scale 1 / 8
        check(q, k, v, AttentionOptions(causal=causal))


@pytest.mark.parametrize("lengths", [(1, 128), (2, 1), (1, 1)])
def test_single_queries_and_keys(lengths):
    """N3: a long way from a full tile, on either side."""
    check(*random_qkv(lengths, heads=(6, 2), batch=3), with_dlse=True)


def test_large_and_small_scales():
    for scale in (1e-4, 3.0):
        check(*random_qkv((70, 140)), AttentionOptions(softmax_scale=scale, causal=True))


# -- where numbers are rounded ---------------------------------------------------------------------------------------


def test_probabilities_and_score_gradients_are_rounded_to_the_input_type():
    """Two keys with scores 0 and s, hence probabilities 1 - p and p, and with values 0 and 1."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    q[..., 0], k[0, 1, 0, 0], v[0, 1, 0, 0] = 1.0, -0.3125, 1.0
    dout = torch.zeros(1, 1, 1, 8)
    dout[..., 0] = 1.0
    q, k, v, dout = (x.bfloat16() for x in (q, k, v, dout))
    options = AttentionOptions(softmax_scale=1.0)
    dq, dk, dv = backward(q, k, v, dout, options=options, gradient_dtype=torch.float32)
    p = torch.tensor(-0.3125).sigmoid()
    # The first pass has rounded out = p, which the gradients of the scores start from.
    dscore = p * (1 - p.bfloat16().float())
    assert p.bfloat16() != p and dscore.bfloat16() != dscore
    assert dv[0, 1, 0, 0] == p.bfloat16()
    assert dk[0, 1, 0, 0] == dscore.bfloat16()
    assert dq[0, 0, 0, 0] == -0.3125 * dscore.bfloat16().float()


def test_scale_does_not_meet_the_rounded_gradients():
    """A scale so small that the gradients of the scores would vanish in fp16 if it were in them."""
    q, k, v = random_qkv((64, 64), dtype=torch.float16)
    dout, _ = random_gradients(q, v)
    scale = 2.0**-20
    dq, _, _ = backward(q, 256 * k, v, dout, options=AttentionOptions(softmax_scale=scale))
    exact, _, _ = gradients(q, 256 * k, v, dout, options=AttentionOptions(softmax_scale=scale))
    # The rest is the rounding of dq itself, which is subnormal.
    assert (dq.double() - exact).norm() < 2e-3 * exact.norm()


# -- tensors ---------------------------------------------------------------------------------------------------------


def test_strided_tensors():
    """L1: q, k, v, dout each with strides of its own, keys shared by all heads through a stride of 0."""
    qkv = torch.randn(2, 150, 3, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    dout = torch.randn(2, 4, 150, 64, dtype=torch.float64).transpose(1, 2)
    shared = k[:, :, :1].expand(-1, -1, 4, -1)
    actual = backward(q, shared, v.transpose(1, 2).contiguous().transpose(1, 2), dout)
    assert_equal_in_float64(actual, gradients(q, shared, v, dout))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_unwanted_gradients(wanted):
    q, k, v = random_qkv((70, 140), heads=(4, 2))
    dout, dlse = random_gradients(q, v)
    everything = backward(q, k, v, dout, dlse)
    some = backward(q, k, v, dout, dlse, wanted=wanted)
    for gradient, expected, is_wanted in zip(some, everything, wanted, strict=True):
        assert torch.equal(gradient, expected) if is_wanted else gradient is None


def test_gradients_are_bitwise_equal_every_time():
    """The model adds up in one order; what kernels do beside each other is for the GPU tests."""
    q, k, v = random_qkv((150, 200), heads=(6, 2), batch=2)
    dout, dlse = random_gradients(q, v)
    first, *others = (backward(q, k, v, dout, dlse, MASKS["window"]) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
