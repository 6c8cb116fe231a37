"""The reference against loops over single scores, and the checks against results that they must reject."""

import math

import pytest
import torch

from reference import (
    FULL,
    AttentionOptions,
    Sequences,
    assert_attention_close,
    assert_lse_close,
    assert_out_close,
    assert_same_special_values,
    attention,
    cosine_distance,
    forward_tolerance,
)

OPTIONS = {
    "full": FULL,
    "causal": AttentionOptions(causal=True),
    "scale": AttentionOptions(softmax_scale=0.7, causal=True),
    "window": AttentionOptions(window_size=(2, 1)),
    "left": AttentionOptions(window_size=(1, -1)),
    "chunk": AttentionOptions(attention_chunk=3),
    "causal_chunk_window": AttentionOptions(causal=True, window_size=(1, 4), attention_chunk=4),
    "softcap": AttentionOptions(softcap=1.5),
}


def random_qkv(sq, sk, heads=4, heads_kv=2, d=8, dv=8, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sq * 1000 + sk)
    shapes = (batch, sq, heads, d), (batch, sk, heads_kv, d), (batch, sk, heads_kv, dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention_by_loops(q, k, v, options):
    """One sequence, (rows, heads, dim); plain Python numbers."""
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    left, right = options.window_size
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float64)
    for row in range(q.shape[0]):
        position = row + k.shape[0] - q.shape[0]
        keys = [
            j
            for j in range(k.shape[0])
            if not (options.causal and j > position)
            and not (left >= 0 and j < position - left)
            and not (right >= 0 and j > position + right)
            and not (options.attention_chunk and j // options.attention_chunk != position // options.attention_chunk)
        ]
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // k.shape[1])
            weights = {}
            for j in keys:
                score = scale * sum(a * b for a, b in zip(q[row, head].tolist(), k[j, kv_head].tolist(), strict=True))
                if options.softcap:
                    score = options.softcap * math.tanh(score / options.softcap)
                weights[j] = math.exp(score)
            total = sum(weights.values())
            lse[head, row] = math.log(total) if total else -math.inf
            for j, weight in weights.items():
                out[row, head] += weight / total * v[j, kv_head]
    return out, lse


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(5, 7), (9, 4), (1, 6), (3, 0), (0, 3)], ids=str)
def test_reference_matches_loops(name, lengths):
    q, k, v = random_qkv(*lengths)
    out, lse = attention(q, k, v, OPTIONS[name])
    expected_out, expected_lse = attention_by_loops(q[0], k[0], v[0], OPTIONS[name])
    torch.testing.assert_close(out[0], expected_out)
    torch.testing.assert_close(lse[0], expected_lse)


@pytest.mark.parametrize("name", ["full", "causal", "window", "causal_chunk_window"])
def test_chunking_changes_nothing(name):
    q, k, v = random_qkv(37, 29, batch=2)
    whole = attention(q, k, v, OPTIONS[name])
    for max_scores in (1, 200, 1000):
        for part, expected in zip(attention(q, k, v, OPTIONS[name], max_scores=max_scores), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-13, atol=1e-13)


def test_sequences_are_dense_calls_of_their_existing_rows():
    q, k, v = (x[0] for x in random_qkv(20, 26))
    sequences = Sequences([0, 5, 5, 20], [0, 9, 12, 26], seqused_q=[3, 0, 40], seqused_k=[9, 1, 10])
    out, lse = attention(q, k, v, OPTIONS["causal"], sequences)
    for rows, keys in ((slice(0, 3), slice(0, 9)), (slice(5, 20), slice(12, 22))):
        expected_out, expected_lse = attention(q[None, rows], k[None, keys], v[None, keys], OPTIONS["causal"])
        torch.testing.assert_close(out[rows], expected_out[0])
        torch.testing.assert_close(lse[:, rows], expected_lse[0])
    assert out[3:5].isnan().all() and lse[:, 3:5].isnan().all()


def test_one_side_dense():
    q, k, v = random_qkv(6, 12, batch=2)
    sequences = Sequences(cu_seqlens_k=[0, 12, 24])
    out, lse = attention(q, k.flatten(0, 1), v.flatten(0, 1), sequences=sequences)
    expected_out, expected_lse = attention(q, k, v)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_tolerance_is_the_rule_in_numbers():
    reference = torch.tensor([1.0, -0.5], dtype=torch.bfloat16)
    same_precision = torch.tensor([1.0, -0.25], dtype=torch.bfloat16)
    # bf16: 1 + 0.3 = 1.296875, minus 0.3 = 0.99609375, a noise of 2^-8; -0.5 comes back exactly or closer.
    assert forward_tolerance(reference, same_precision, 0.0) == 2 * 0.25 + 2 * 2**-8
    assert forward_tolerance(reference, same_precision, 9.0) == 3 * 0.25 + 2 * 2**-8


def test_cosine_distance():
    x = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    assert cosine_distance(x, x) == pytest.approx(0.0, abs=1e-15)
    assert cosine_distance(x, -x) == pytest.approx(2.0)
    assert cosine_distance(x, 1.01 * x) == pytest.approx(0.01**2 / (1 + 1.01**2), rel=1e-6)
    assert cosine_distance(0 * x, 0 * x) == 0.0
    assert cosine_distance(x, 0 * x) == 1.0


def rounded_result(dtype, options):
    q, k, v = random_qkv(40, 50, d=64, dv=64, dtype=dtype)
    out, lse = attention(q, k, v, options)
    return out.to(dtype), lse.float(), q, k, v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "softcap"])
def test_checks_accept_the_rounded_exact_result(dtype, name):
    assert_attention_close(*rounded_result(dtype, OPTIONS[name]), OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_checks_reject_wrong_results(dtype):
    options = OPTIONS["causal"]
    out, lse, q, k, v = rounded_result(dtype, options)

    def rejected(wrong_out, wrong_lse, match, options=options):
        with pytest.raises(AssertionError, match=match):
            assert_attention_close(wrong_out, wrong_lse, q, k, v, options)

    rejected(out, lse, "out", OPTIONS["full"])
    rejected(out.roll(1, dims=1), lse, "largest error")
    rejected(out.roll(1, dims=2), lse, "largest error")
    rejected(out * 1.01, lse, "cosine distance|largest error")
    rejected(torch.where(out == out.max(), 0.0, out), lse, "largest error")
    rejected(out, lse + 1e-3, "lse")
    rejected(out, lse / math.log(2.0), "lse")
    one_nan = out.clone()
    one_nan[0, 3, 1, 7] = float("nan")
    rejected(one_nan, lse, r"NaN, first \[0, 3, 1, 7\]")


def test_cosine_check_catches_what_the_largest_error_hides():
    """A small error in every element next to one large value."""
    exact = torch.full((4096,), 0.01, dtype=torch.float64)
    exact[0] = 8.0
    noisy = (exact * (1 + 0.3 * torch.where(exact < 1, 1.0, 0.0))).to(torch.bfloat16)
    loose = exact + 0.1
    with pytest.raises(AssertionError, match="cosine distance"):
        assert_out_close(noisy, exact, loose, 0.0)


def test_special_values_must_stand_in_the_same_places():
    inf, nan = float("inf"), float("nan")
    expected = torch.tensor([1.0, inf, -inf, nan])
    assert_same_special_values(torch.tensor([2.0, inf, -inf, nan]), expected, "x")
    for wrong in ([inf, inf, -inf, nan], [1.0, 1.0, -inf, nan], [1.0, inf, inf, nan], [1.0, inf, -inf, 0.0]):
        with pytest.raises(AssertionError, match="x: "):
            assert_same_special_values(torch.tensor(wrong), expected, "x")
    with pytest.raises(AssertionError, match="-inf"):
        assert_lse_close(torch.tensor([0.0]), torch.tensor([-inf]))
