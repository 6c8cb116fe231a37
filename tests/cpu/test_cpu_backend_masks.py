"""Which keys the CPU back end lets each query see, exactly."""

import math

import pytest
import torch

from cpu_calls import check, forward, random_qkv
from reference import AttentionOptions

WINDOW_SIDES = (-1, 0, 1, 20, 150, 10_000)


def check_visible_keys(lengths: tuple[int, int], options: AttentionOptions) -> None:
    """With q = 0 and one-hot values, out[i, j] is 1 / (number of keys that i sees) where i sees j, else 0."""
    len_q, len_k = lengths
    _, k, _ = random_qkv(lengths, heads=(1, 1))
    q = torch.zeros(1, len_q, 1, 64, dtype=torch.bfloat16)
    v = torch.eye(256, dtype=torch.bfloat16)[None, :len_k, None]
    out, lse = forward(q, k, v, options)
    for row in range(len_q):
        position = row + len_k - len_q
        left, right = options.window_size
        keys = set(range(len_k))
        if options.causal:
            keys &= set(range(position + 1))
        if left >= 0:
            keys &= set(range(position - left, len_k))
        if right >= 0:
            keys &= set(range(position + right + 1))
        if options.attention_chunk:
            chunk = math.floor(position / options.attention_chunk) * options.attention_chunk
            keys &= set(range(chunk, chunk + options.attention_chunk))
        expected = torch.zeros(256, dtype=torch.bfloat16)
        expected[sorted(keys)] = 1.0 / max(1, len(keys))
        assert torch.equal(out[0, row, 0], expected), f"row {row}"
        expected_lse = math.log(len(keys)) if keys else -math.inf
        assert float(lse[0, 0, row]) == pytest.approx(expected_lse, rel=1e-6, abs=1e-6), f"row {row}"


@pytest.mark.parametrize("lengths", [(90, 200), (200, 90), (129, 129), (256, 1), (1, 256)], ids=str)
@pytest.mark.parametrize("left", WINDOW_SIDES)
def test_every_window_pair_sees_exactly_its_keys(left, lengths):
    """W1, W2, W3: both ends inclusive, -1 and anything past the sequence unlimited, also with sq > sk."""
    for right in WINDOW_SIDES:
        check_visible_keys(lengths, AttentionOptions(window_size=(left, right)))


@pytest.mark.parametrize("lengths", [(90, 200), (200, 90), (256, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
def test_chunks_see_exactly_their_keys(chunk, causal, lengths):
    """W3."""
    for window_size in ((-1, -1), (3, 60)):
        check_visible_keys(lengths, AttentionOptions(causal=causal, window_size=window_size, attention_chunk=chunk))


def test_window_over_a_longer_key_sequence():
    """W4: every row of the first query tile, not only the later ones."""
    q, k, v = random_qkv((300, 1500))
    check(q, k, v, AttentionOptions(window_size=(333, 0)))


def test_causal_is_aligned_at_the_bottom_right():
    """W5: with more queries than keys the leading rows see nothing; a top-left mask would give row 0 key 0."""
    q, k, v = random_qkv((10, 4), heads=(1, 1))
    out, _ = forward(q, k, v, AttentionOptions(causal=True))
    assert (out[0, :6] == 0).all()
    assert torch.equal(out[0, 6], v[0, 0])
    q, k, v = random_qkv((4, 10), heads=(1, 1))
    last_row, _ = forward(q[:, -1:], k, v)
    out, _ = forward(q, k, v, AttentionOptions(causal=True))
    torch.testing.assert_close(out[:, -1:], last_row)
