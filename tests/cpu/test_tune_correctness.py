"""The tuner's check of a kernel, against the tests' own reference and against results that are wrong."""

import itertools
import math

import pytest
import torch

from flash_attn_3.config import Mask, Score
from flash_attn_3.tile_table import TileKey
from flash_attn_3.tune import correctness
from flash_attn_3.tune.shapes import TuneShape
from reference import AttentionOptions, attention

KEYS = [TileKey(*dims, mask, score) for dims, mask, score in itertools.product([(64, 64), (64, 128)], Mask, Score)]


def _inputs(key: TileKey) -> tuple[TuneShape, tuple[torch.Tensor, ...]]:
    shape = TuneShape(key, batch=2, seqlen=70, heads=3)
    generator = torch.Generator().manual_seed(0)
    widths = (key.head_dim, key.head_dim, key.head_dim_v)
    return shape, tuple(torch.randn(2, 70, 3, w, generator=generator).bfloat16() for w in widths)


def _exact(shape: TuneShape, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """By the tests' reference: out (batch, seqlen, heads, dim), lse (batch, heads, seqlen)."""
    window = (shape.mask.window_left, shape.mask.window_right)
    return attention(*tensors, AttentionOptions(window_size=window, softcap=shape.softcap))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_reference_agrees_with_the_other_one(key, monkeypatch):
    monkeypatch.setattr(correctness, "ROWS", 32)  # so that rows come in several chunks
    shape, tensors = _inputs(key)
    expected, expected_lse = _exact(shape, tensors)
    found = correctness.reference(*tensors, shape)
    for number, (sequence, head) in enumerate(correctness.checked_heads(shape)):
        torch.testing.assert_close(found.out[number], expected[sequence, :, head])
        torch.testing.assert_close(found.lse[number], expected_lse[sequence, head])


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_right_result_passes(key):
    shape, tensors = _inputs(key)
    out, lse = _exact(shape, tensors)
    assert correctness.what_is_wrong(out.bfloat16(), lse.float(), correctness.reference(*tensors, shape), shape) is None


def test_trials_are_steep_and_plain():
    """Steep: a block's exponentials relative to what is seen before it add up to more than any rescale bears with."""
    shape = TuneShape(KEYS[0], batch=1, seqlen=600, heads=1)
    steep, plain = correctness.trials(shape, "cpu")
    for trial, grows in ((steep, True), (plain, False)):
        scores = trial.q[0, :, 0].double() @ trial.k[0, :, 0].double().T * 64**-0.5 / math.log(2)
        growth = scores[:, :128].amax(1) - scores[:, -128:].amax(1)
        assert bool((growth > 15).any()) == grows
        assert correctness.relative_error(trial.exact.out.permute(1, 0, 2)[None], trial.exact, shape) == 0.0


def test_the_first_and_the_last_head_are_checked():
    shape = TuneShape(KEYS[0], batch=4, seqlen=1, heads=5)
    assert {(0, 0), (3, 4)} <= set(correctness.checked_heads(shape))
    assert all(sequence < 4 and head < 5 for sequence, head in correctness.checked_heads(shape))
    assert set(correctness.checked_heads(TuneShape(KEYS[0], 1, 1, 1))) == {(0, 0)}


def _last_key_missing(out, lse, shape, tensors):
    q, k, v = tensors
    short = _exact(shape, (q[:, 1:], k[:, :-1], v[:, :-1]))
    out[:, 1:], lse[:, :, 1:] = short


def _one_row_unwritten(out, lse, shape, tensors):
    out[1, 17, 1] = float("nan")


def _lse_unwritten(out, lse, shape, tensors):
    lse[0, 2, 69] = float("nan")


def _heads_exchanged(out, lse, shape, tensors):
    out[:] = out.flip(2)


def _lse_off(out, lse, shape, tensors):
    lse += 0.05


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_last_key_missing, "relative error"),
        (_one_row_unwritten, "out has rows that were not written"),
        (_lse_unwritten, "lse has rows that were not written"),
        (_heads_exchanged, "relative error"),
        (_lse_off, "log-sum-exp is off by 5"),
    ],
)
def test_wrong_results_are_found(spoil, message):
    shape, tensors = _inputs(TileKey(64, 64, Mask.FULL, Score.SCALED))
    exact = correctness.reference(*tensors, shape)
    out, lse = _exact(shape, tensors)
    spoil(out, lse, shape, tensors)
    wrong = correctness.what_is_wrong(out.bfloat16(), lse.float(), exact, shape)
    assert wrong is not None and wrong.startswith(message)
