"""Dense forward: every head dim, dtype, mask, softcap, GQA ratio and odd pair of lengths, against plain attention."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_attn_3 import launch

from .cases import CAUSAL, FULL, KERNEL_MASKS, MASKS, Case, MaskOptions, each
from .harness import check, make_tensors, run

#: (head_dim, head_dim_v); every kernel's own width and widths that fill it only in part (L4).
HEAD_DIMS = [
    *((d, d) for d in (8, 40, 64, 72, 80, 96, 128, 136, 192, 248, 256)),
    *((192, 128), (160, 104), (64, 128), (64, 256), (64, 512), (40, 320), (24, 72)),
]

#: (seqlen_q, seqlen_k): one row, odd, off by one around a tile, longer queries than keys, longer keys than queries.
LENGTHS = [
    *((1, 1), (1, 64), (1, 257), (2, 1), (3, 513), (63, 65), (64, 128), (64, 129), (113, 203), (127, 1)),
    *((128, 217), (129, 128), (191, 193), (257, 256), (300, 1000), (307, 256), (511, 1), (512, 256)),
    *((640, 128), (1000, 63), (1023, 1024), (1024, 1023), (2048, 2048)),
]

LONG_WINDOW = MaskOptions("long_window", window_size=(512, 256))


def _grid() -> list[Case]:
    """dtype x head dim x mask x softcap; lengths, head counts and scale vary along the way."""
    lengths = itertools.cycle([(113, 203), (257, 256), (1, 257), (300, 700), (640, 128), (64, 129), (511, 513)])
    heads = itertools.cycle([(4, 4), (6, 2), (3, 1), (8, 1)])
    scales = itertools.cycle([None, None, 0.3])
    return [
        Case(
            d,
            dv,
            dtype,
            seqlen_q=sq,
            seqlen_k=sk,
            heads_q=hq,
            heads_kv=hk,
            softcap=softcap,
            softmax_scale=scale,
            **mask.options,
        )
        for dtype, (d, dv), mask, softcap in itertools.product(
            (torch.bfloat16, torch.float16), HEAD_DIMS, MASKS, (0.0, 15.0)
        )
        for (sq, sk), (hq, hk), scale in [(next(lengths), next(heads), next(scales))]
    ]


def _length_sweep() -> list[Case]:
    return [
        Case(head_dim, seqlen_q=sq, seqlen_k=sk, **mask.options)
        for head_dim, mask, (sq, sk) in itertools.product((64, 128, 256), (*KERNEL_MASKS, LONG_WINDOW), LENGTHS)
    ]


def _gqa_sweep() -> list[Case]:
    ratios = [(1, 4), (2, 2), (3, 2), (5, 1), (6, 2), (7, 1), (8, 2), (9, 1), (16, 2), (63, 1), (126, 1), (128, 1)]
    return [
        Case(head_dim, seqlen_q=200, seqlen_k=333, heads_q=ratio * heads_kv, heads_kv=heads_kv, **mask.options)
        for head_dim, mask, (ratio, heads_kv) in itertools.product((64, 128), KERNEL_MASKS, ratios)
    ]


@each(_grid())
def test_grid(case: Case) -> None:
    """L4 and the cross product: dtype x head dims x mask x softcap."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(_length_sweep())
def test_lengths(case: Case) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(_gqa_sweep())
def test_gqa_ratios(case: Case) -> None:
    """L3: ratios that divide no tile."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(Case(d, batch=1, seqlen_q=4096, seqlen_k=4096, **mask.options) for d in (64, 128, 256) for mask in (FULL, CAUSAL))
def test_long_sequence(case: Case) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(Case(d, seqlen_q=77, seqlen_k=77) for d in (64, 128))
@pytest.mark.parametrize("magnitude", [1e-3, 8.0, 30.0])
def test_input_magnitudes(case: Case, magnitude: float) -> None:
    """Nearly uniform weights, and weights on one key alone."""
    tensors = make_tensors(case)
    tensors.q *= magnitude
    tensors.k *= magnitude
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, softcap=cap, seqlen_q=150, seqlen_k=190, **mask.options)
    for d in (64, 128)
    for cap in (0.5, 30.0)
    for mask in KERNEL_MASKS
)
def test_softcap_values(case: Case) -> None:
    """Scores far beyond the cap saturate, scores far below pass through."""
    tensors = make_tensors(case)
    tensors.q *= 10.0
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, dv, **lengths, all_sms=True, softcap=softcap, **mask.options)
    for (d, dv), mask, lengths, softcap in itertools.product(
        [(64, 64), (64, 128), (64, 512), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)],
        KERNEL_MASKS,
        [{"seqlen_q": 130, "seqlen_k": 300}, {"lens_q": (130, 0, 1, 64), "lens_k": (300, 5, 0, 200)}],
        (0.0, 15.0),
    )
)
def test_tiles_of_one_warpgroup(case: Case) -> None:
    """What serves calls of few tiles, as this one where all multiprocessors may."""
    assert case.kernel_config().block_m == 64
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each([Case(128, seqlen_q=300, seqlen_k=300, causal=True, all_sms=True)])
@pytest.mark.parametrize("left", [1, 2, pytest.param(16, marks=pytest.mark.hardware)])
def test_sm_margin(case: Case, left: int, launched_ctas: dict[str, list[int]]) -> None:
    """CTAs on the multiprocessors that are left alone, and the same bits."""
    tensors = make_tensors(case)
    out, lse = run(case, tensors)
    out_margin, lse_margin = run(case, tensors, sm_margin=launch.device_sms(torch.device("cuda", 0)) - left)
    all_ctas, few_ctas = launched_ctas["forward"]
    assert all_ctas > few_ctas == left
    check(case, tensors, out_margin, lse_margin)
    assert torch.equal(out, out_margin)
    assert torch.equal(lse, lse_margin)


@each([Case(128, seqlen_q=200, seqlen_k=300)])
@pytest.mark.parametrize(
    "options", [{"num_splits": 0}, {"pack_gqa": True}, {"pack_gqa": False}, {"deterministic": True}], ids=str
)
def test_performance_hints_do_not_change_the_result(case: Case, options: dict[str, object]) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors, **options))
