"""The calls that a tile must serve before it comes into the table: what is right passes, what is wrong does not."""

import itertools

import pytest
import torch

from flash_attn_3 import cpu_backend
from flash_attn_3.config import Dtype, Mask, Score, SeqLayout
from flash_attn_3.heuristics import plan_choice
from flash_attn_3.tile_table import ForwardTile, TileChoice, TileKey
from flash_attn_3.tune.serving import HEADS, LENGTHS, served_calls, what_is_wrong
from flash_attn_3.tune.shapes import softcap_of
from reference import AttentionOptions, Sequences, attention

KEYS = [TileKey(64, 64, mask, score) for mask, score in itertools.product(Mask, Score)]
SERVED = list(itertools.product(Dtype, SeqLayout))
CHOICE = TileChoice(None, ForwardTile(128, 64), 1)


def _calls(key, dtype=Dtype.BF16, layout=SeqLayout.VARLEN):
    return list(served_calls(key, dtype, layout, 132, "cpu"))


def _lists(call):
    return Sequences(*(None if cu_seqlens is None else cu_seqlens.tolist() for cu_seqlens in call.cu_seqlens))


@pytest.mark.parametrize(("dtype", "layout"), SERVED, ids=str)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_reference_agrees_with_the_other_one(key, dtype, layout):
    for call in _calls(key, dtype, layout):
        mask = call.problem.mask
        options = AttentionOptions(
            causal=key.mask is Mask.CAUSAL,
            window_size=(mask.window_left, mask.window_right),
            softcap=softcap_of(key.score),
        )
        out, lse = attention(call.q, call.k, call.v, options, _lists(call))
        torch.testing.assert_close(call.exact.out, out.reshape(-1, HEADS, 64), equal_nan=True)
        torch.testing.assert_close(call.exact.lse, lse.transpose(-1, -2).reshape(-1, HEADS), equal_nan=True)


@pytest.mark.parametrize(("dtype", "layout"), SERVED, ids=str)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_model_of_the_kernels_passes(key, dtype, layout):
    for call in _calls(key, dtype, layout):
        assert what_is_wrong(*_results(call), call) is None


def _results(call):
    out, lse = call.new_results()
    plan = plan_choice(call.problem, CHOICE)
    scales = (call.q.shape[-1] ** -0.5, softcap_of(call.problem.score))
    tensors = (call.q, call.k, call.v, out, lse, *call.cu_seqlens, None, None)
    cpu_backend.forward(plan, call.problem, *tensors, *scales)
    return out, lse


@pytest.mark.parametrize("layout", SeqLayout)
@pytest.mark.parametrize("mask", Mask)
def test_the_calls_have_what_is_hard(mask, layout):
    calls = _calls(TileKey(64, 64, mask, Score.SCALED), layout=layout)
    assert {plan_choice(call.problem, CHOICE).packed_heads for call in calls} == {1, 2}
    poisoned = [call.exact for call in calls if "NaN" in call.name]
    plain = [call.exact for call in calls if "NaN" not in call.name]
    for exact in plain:
        assert not exact.lse.isnan().any()
        assert bool(exact.lse.isneginf().any()) == (mask is not Mask.FULL or layout is SeqLayout.VARLEN)
    for exact in poisoned:
        assert 0 < int(exact.lse.isnan().sum()) < exact.lse.numel()
        assert torch.equal(exact.lse.isnan(), exact.out.isnan().all(-1))
    assert all(max(lens) % 64 for lens in zip(*LENGTHS[layout], strict=True)), "tiles must have tails"


def _one_row_unwritten(out, lse):
    out[17, 1] = float("nan")


def _one_row_of_another_head(out, lse):
    out[500, 0] = out[500, 3]


def _nan_hidden(out, lse):
    out.nan_to_num_()


def _nan_hidden_in_lse(out, lse):
    lse.nan_to_num_(nan=0.0)


def _nan_spread(out, lse):
    lse[0, :20] = float("nan")


def _hidden_rows_not_zero(out, lse):
    out[0] = 1.0


def _hidden_rows_finite(out, lse):
    lse[0, 0] = -1e30


def _one_lse_off(out, lse):
    lse[3, 500] += 0.05


def _last_column_missing(out, lse):
    out[400:, :, -16:] = 0.0


@pytest.mark.parametrize(
    ("spoil", "number", "message"),
    [
        (_one_row_unwritten, 0, "out is NaN in other rows than it should be"),
        (_nan_hidden, 2, "out is NaN in other rows than it should be"),
        (_nan_hidden_in_lse, 2, "lse is NaN in other rows than it should be"),
        (_nan_spread, 2, "lse is NaN in other rows than it should be"),
        (_one_row_of_another_head, 1, "1 of 2260 rows of out are wrong"),
        (_hidden_rows_not_zero, 0, "4 of 2260 rows of out are wrong"),
        (_last_column_missing, 0, "660 of 2260 rows of out are wrong"),
        (_hidden_rows_finite, 0, "the log-sum-exp of 1 of 2260 rows is wrong"),
        (_one_lse_off, 0, "the log-sum-exp of 1 of 2260 rows is wrong"),
    ],
)
def test_wrong_results_are_found(spoil, number, message):
    call = _calls(TileKey(64, 64, Mask.CAUSAL, Score.SCALED))[number]
    out, lse = _results(call)
    spoil(out, lse)
    assert what_is_wrong(out, lse, call) == message
