"""What the benchmarks measure: shapes, their pairs and flops, and the bars that results are held to."""

import dataclasses
import json
import random

import pytest
import torch
from benchmarks import bars, comparison, fa3, peers, report
from benchmarks.bars import failures
from benchmarks.comparison import errors
from benchmarks.forward import Forward, _checked_heads
from benchmarks.shapes import LONGEST, SETS, AttentionShape, counterpart, draw_lengths, select
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3.timing import Timing
from reference import AttentionOptions, visible_pairs

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple)
sides = st.integers(-1, 45)


# -- pairs and flops -------------------------------------------------------------------------------------------------


@given(st.booleans(), st.tuples(sides, sides), lengths)
def test_visible_pairs_against_brute_force(causal, window, lens):
    options = AttentionOptions(causal=causal, window_size=window)
    expected = [int(visible_pairs(options, range(n), n, n).sum()) for n in lens]
    assert AttentionShape(64, causal, len(lens), max(lens), 2, 1, window, lens).visible_pairs == sum(expected)
    dense = AttentionShape(64, causal, 3, lens[0], 2, 1, window)
    assert dense.visible_pairs == 3 * expected[0]


@given(lengths, st.sampled_from([(False, (5, 0)), (False, (-1, -1)), (True, (-1, -1)), (True, (7, 3))]))
def test_flops_count_visible_pairs(lens, mask):
    shape = AttentionShape(64, mask[0], len(lens), max(lens), 6, 2, mask[1], lens)
    assert shape.flops == 4 * 64 * 6 * shape.visible_pairs


def test_flops_of_plain_shapes_are_as_everybody_counts_them():
    assert AttentionShape(128, False, 2, 1024, 8, 8).flops == 4 * 2 * 8 * 1024**2 * 128
    assert AttentionShape(128, True, 2, 1024, 8, 8).flops == 2 * 2 * 8 * 1024**2 * 128
    assert AttentionShape(192, False, 2, 1024, 8, 8, head_dim_v=128).flops == 2 * 2 * 8 * 1024**2 * (192 + 128)


# -- sets ------------------------------------------------------------------------------------------------------------


def test_the_usual_set():
    assert len(SETS["peers"]) == 39
    for shape in SETS["peers"]:
        assert shape.is_plain and counterpart(shape) is None
        assert fa3.forward_ratio(shape) is not None
        tokens = shape.batch * shape.seqlen
        assert tokens == (32768 if shape.seqlen == 32768 else 16384)


def test_windows_and_varlen_batches():
    windows = [shape for shape in SETS["b4"] if shape.mask == "window"]
    batches = [shape for shape in SETS["b4"] if shape.is_varlen]
    assert windows + batches == SETS["b4"]
    assert {(s.head_dim, s.window, s.batch, s.seqlen) for s in windows} == {(d, (1024, 0), 1, 16384) for d in (64, 128)}
    assert all(shape.heads_q * shape.head_dim == 2048 for shape in SETS["b4"])
    for shape in batches:
        assert sum(shape.lengths) == 32768 and shape.batch == len(shape.lengths) == 16, "a mean of 2048"
        assert shape.seqlen == max(shape.lengths)
        assert max(shape.lengths) / min(shape.lengths) == pytest.approx(16, rel=0.01)
    for head_dim in (64, 128):
        for mask in ("full", "causal"):
            drawn = [s.lengths for s in batches if (s.head_dim, s.mask) == (head_dim, mask)]
            assert len(set(drawn)) == len(drawn) == 8
    assert len({frozenset(shape.lengths) for shape in batches}) == 8, "all kinds of kernel get the same batches"


def test_the_draw_is_the_same_everywhere():
    """Literal: another draw would make figures of different runs incomparable."""
    shape = next(shape for shape in SETS["b4"] if shape.is_varlen)
    assert shape.lengths == (
        4991, 3466, 835, 423, 1225, 783, 3865, 509, 1059, 1660, 6528, 1191, 466, 3435, 1924, 408
    )  # fmt: skip


@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(1, 100), st.floats(1.0, 64.0))
def test_drawn_lengths(seed, sequences, mean, spread):
    tokens = mean * sequences * 64
    drawn = draw_lengths(random.Random(seed), sequences, tokens, spread)
    assert len(drawn) == sequences and sum(drawn) == tokens
    assert drawn == draw_lengths(random.Random(seed), sequences, tokens, spread)
    least = tokens / (sequences * spread)
    assert min(drawn) >= least - 1 and max(drawn) <= spread * (min(drawn) + 1) + 1


def test_names_tell_shapes_apart():
    shapes = list(dict.fromkeys(shape for group in SETS.values() for shape in group))
    assert len({shape.name for shape in shapes}) == len(shapes)


def test_counterparts():
    for shape in SETS["b4"]:
        other = counterpart(shape)
        assert other.is_plain and (other.head_dim, other.heads_q) == (shape.head_dim, shape.heads_q)
        assert other.batch * other.seqlen == (sum(shape.lengths) or shape.seqlen)
        assert other.causal == (shape.causal or shape.mask == "window")
    (longest,) = SETS["b7"]
    assert longest == LONGEST and (longest.seqlen, longest.heads_q, longest.heads_kv) == (131072, 4, 1)
    assert counterpart(longest) == dataclasses.replace(longest, seqlen=32768)


def test_keys_wider_than_values():
    shapes = {(s.batch, s.heads_q, s.heads_kv, s.head_dims, s.seqlen, s.mask) for s in SETS["c4"]}
    assert shapes == {(2, 128, 128, (192, 128), s, mask) for s in (4096, 8192) for mask in ("full", "causal")}
    shape = SETS["c4"][0]
    assert shape.input_shapes == ((2, 4096, 128, 192), (2, 4096, 128, 192), (2, 4096, 128, 128))
    assert shape.out_shape == (2, 4096, 128, 128)
    assert shape.name == "d192/128 full 2x4096 128/128"


def test_selection():
    assert select("b4,window") == [shape for shape in SETS["b4"] if shape.mask == "window"]
    assert select("b4,d128,causal") == [
        shape for shape in SETS["b4"] if (shape.head_dim, shape.mask) == (128, "causal")
    ]
    assert select("b7") == [LONGEST]
    with pytest.raises(ValueError, match=r"got .wide.; it must be one of peers, bars, quick, b4, b7, c4, full, c"):
        select("wide")


# -- the check of a result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(8, False, 1, 40, 4, 2, window=(7, 0)),
        AttentionShape(8, True, 3, 25, 4, 2, lengths=(1, 25, 9)),
        AttentionShape(8, True, 2, 20, 4, 4),
    ],
    ids=lambda shape: shape.name,
)
def test_a_right_result_passes_and_another_masks_does_not(shape):
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func  # noqa: F401  what peers.py imports

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator).bfloat16() for size in shape.input_shapes)
    what = Forward()
    expected = what.reference((q, k, v), shape)
    rows = sum(shape.lengths[sequence] if shape.is_varlen else shape.seqlen for sequence, _ in _checked_heads(shape))
    assert expected[0].shape == (rows, shape.head_dim)
    found = errors(what.checked(what.call(peers.OURS, (q, k, v), shape)(), shape), expected)
    assert not found["wrong"] and found["relative_error"] < 1e-2
    other = dataclasses.replace(shape, causal=not shape.causal, window=(-1, -1))
    assert errors(what.checked(what.call(peers.OURS, (q, k, v), other)(), shape), expected)["wrong"]


def test_a_counterpart_takes_turns_with_its_shape(monkeypatch):
    """Ours takes 3 ms here and 4 ms on the counterpart, whose sequences are of equal length."""
    shape = AttentionShape(8, True, 3, 18, 4, 2, lengths=(3, 18, 9))
    other = counterpart(shape)

    def time_in_turns(calls, rounds):
        outs = {name: call() for name, call in calls.items()}
        assert outs["counterpart"][0].shape == other.out_shape
        times = {peers.OURS: 3.0, "counterpart": 4.0}
        return {name: Timing((times[name],) * rounds) for name in calls}

    monkeypatch.setattr(comparison, "DEVICE", "cpu")
    monkeypatch.setattr(comparison, "time_in_turns", time_in_turns)
    row = comparison.measure_shape(Forward(), shape, ["cudnn", "fa4"], torch.bfloat16, rounds=2)
    assert row["results"][peers.OURS]["ms"] == 3.0 and not row["results"][peers.OURS]["wrong"]
    assert set(row["results"]) == {peers.OURS, "cudnn", "fa4"} and row["ratios"] == {}
    assert row["results"]["cudnn"]["unavailable"].startswith("NotImplementedError")
    assert (row["counterpart"]["name"], row["counterpart"]["ms"]) == (other.name, 4.0)
    assert row["counterpart"]["relative_pair_time"] == pytest.approx(
        (3.0 / shape.visible_pairs) / (4.0 / other.visible_pairs)
    )
    json.dumps(row)


@pytest.mark.parametrize("peer", ["cudnn", "flash", "flex"])
@pytest.mark.parametrize("shape", [SETS["b4"][0], SETS["b4"][-1]], ids=lambda shape: shape.name)
def test_peers_refuse_what_they_would_compute_wrongly(peer, shape):
    with pytest.raises(NotImplementedError):
        peers.BUILDERS[peer](torch.empty(0), torch.empty(0), torch.empty(0), shape)


# -- bars ------------------------------------------------------------------------------------------------------------


def row(
    shape: AttentionShape, front: float = 1.2, cudnn: float = 1.2, fa4: float = 1.2, pair_time: float = 1.0
) -> dict:
    """A result in which this package has these speeds in units of its peers'."""
    other = counterpart(shape)
    beside = {} if other is None else {"counterpart": {"name": other.name, "relative_pair_time": pair_time}}
    ours = {"wrong": False, "relative_error": 3e-3}
    return {
        "name": shape.name,
        "results": {peers.OURS: ours},
        "ratios": {"cudnn": cudnn, "fa4": fa4},
        "front": {"name": "fa3", "ratio": front},
        **beside,
    }


def failed(rows: list[dict]) -> list[str]:
    return [verdict.bar for verdict in bars.judge("fwd", rows) if not verdict.holds]


def test_all_bars_hold_at_good_speeds():
    rows = [row(shape) for name in ("peers", "b4", "b7") for shape in SETS[name]]
    verdicts = bars.judge("fwd", rows)
    assert {verdict.bar for verdict in verdicts} == {"cudnn", "B1", "B2", "B3", "B4", "B7"}
    assert all(verdict.holds for verdict in verdicts)


def test_means_over_the_front():
    shapes = SETS["peers"]
    assert failed([row(shape, front=1.15) for shape in shapes]) == []
    assert failed([row(shape, front=1.149) for shape in shapes]) == ["B3"]
    assert failed([row(shape, front=1.04 if shape.seqlen > 1024 else 1.2) for shape in shapes]) == ["B2"]
    assert failed([row(shape, front=1.04) for shape in shapes]) == ["B1", "B2", "B3"]
    one_slow = [row(shape, front=0.96 if shape.seqlen == 32768 else 1.2) for shape in shapes]
    (verdict,) = [verdict for verdict in bars.judge("fwd", one_slow) if not verdict.holds]
    assert verdict.bar == "B1" and verdict.text.endswith("d128 causal 1x32768 32/8, x front: 0.960, at least 0.97")


def test_a_mean_is_judged_only_over_all_of_its_shapes_and_peers():
    rows = [row(shape, front=0.5, cudnn=1.2) for shape in SETS["peers"]]
    assert failed(rows[1:]) == []
    del rows[7]["ratios"]["fa4"]
    assert failed(rows) == []


def test_windows_and_lengths_against_fa4_and_dense():
    shape = SETS["b4"][0]
    assert failed([row(shape, fa4=1.1, pair_time=1.25)]) == []
    assert failed([row(shape, fa4=1.09, pair_time=1.26)]) == ["B4", "B4"]
    alone = row(shape, pair_time=1.3)
    del alone["ratios"]["fa4"]
    assert failed([alone]) == ["B4"]


def test_the_longest_sequence():
    assert failed([row(LONGEST, pair_time=1 / 0.981)]) == []
    assert failed([row(LONGEST, pair_time=1 / 0.979)]) == ["B7"]


def test_wrong_results_and_slow_shapes_fail():
    result = row(SETS["bars"][0], cudnn=0.94)
    result["results"][peers.OURS] = {"wrong": True, "relative_error": 0.5}
    verdicts = [dataclasses.asdict(verdict) for verdict in bars.judge("fwd", [result])]
    assert failures({"bars": verdicts}) == [
        "error: d64 full 2x8192 32/32, this package: relative error 5.0e-01",
        "cudnn: d64 full 2x8192 32/32, x cuDNN: 0.940, at least 0.95",
    ]


def test_the_report_shows_counterparts_and_bars():
    result = row(SETS["b4"][0], pair_time=1.3)
    speeds = {"tflops": 500.0, "spread": 0.01, "wrong": False, "max_error": 1e-3}
    result["results"] = {peers.OURS: speeds, "fa4": speeds}
    result["fa3_equivalent_tflops"] = None
    verdicts = [dataclasses.asdict(verdict) for verdict in bars.judge("fwd", [result])]
    text = report._pass_table({"rows": [result], "settings": {"peers": ["fa4"]}, "bars": verdicts})
    assert "| 1.20 | 1.30 (d64 causal 1x16384 32/32) |" in text
    assert "- B4: d64 window 1024,0 1x16384 32/32, x FlashAttention-4: 1.200, at least 1.1: yes" in text
    assert "time for a pair x dense: 1.300, at most 1.25: **no**" in text
