"""Query heads that share a key head, side by side in one tile: any number of them, whole tiles and parts of them."""

from __future__ import annotations

import itertools

import pytest

from .cases import KERNEL_MASKS, Case, each
from .harness import check, make_tensors, run

#: Heads that share a key head. Some fill a warpgroup's rows, most leave some unused, one is too many to be packed.
RATIOS = (2, 3, 5, 6, 7, 8, 12, 63, 71)
#: One row, a warpgroup's positions and one more where 7 heads are packed, a warpgroup's rows, and several tiles.
LENGTHS = (1, 9, 10, 64, 65, 300)


def _packed_cases() -> list[Case]:
    """Ratios and lengths for which tiles hold several heads, whole, in part, and with positions beyond the end."""
    shapes = [(1, 300, 8, 2), (3, 513, 64, 1), (17, 17, 12, 1), (64, 129, 8, 1), (100, 100, 32, 2), (257, 300, 4, 1)]
    return [
        Case(d, dv, seqlen_q=sq, seqlen_k=sk, heads_q=hq, heads_kv=hk, softcap=softcap, **mask.options)
        for (d, dv), softcap in itertools.product(
            ((64, 64), (128, 128), (256, 256), (64, 512), (192, 128)), (0.0, 15.0)
        )
        for mask in KERNEL_MASKS
        for sq, sk, hq, hk in shapes
    ]


@pytest.mark.parametrize("pack_gqa", [True, False, None])
@each(_packed_cases())
def test_packed_heads(case: Case, pack_gqa: bool | None) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors, pack_gqa=pack_gqa))


@pytest.mark.parametrize("pack_gqa", [True, False])
@each(
    Case(d, lens_q=(1, 0, 5, 130, 64), lens_k=(200, 3, 0, 131, 64), heads_q=16, heads_kv=2, **mask.options)
    for d in (64, 256)
    for mask in KERNEL_MASKS
)
def test_packed_heads_of_sequences_of_different_lengths(case: Case, pack_gqa: bool) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors, pack_gqa=pack_gqa))


def _ratio_cases() -> list[Case]:
    """Every ratio with every mask and length; head dims, and with them how output is stored, vary along the way."""
    dims = itertools.cycle([(64, 64), (128, 128), (256, 256), (192, 128), (96, 96)])
    softcaps = itertools.cycle([0.0, 0.0, 15.0])
    return [
        Case(d, dv, seqlen_q=length, seqlen_k=333, heads_q=ratio, heads_kv=1, softcap=softcap, **mask.options)
        for mask, ratio, length in itertools.product(KERNEL_MASKS, RATIOS, LENGTHS)
        for (d, dv), softcap in [(next(dims), next(softcaps))]
    ]


@pytest.mark.parametrize("pack_gqa", [True, None])
@each(_ratio_cases())
def test_ratios(case: Case, pack_gqa: bool | None) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors, pack_gqa=pack_gqa))


@each(
    Case(d, lens_q=LENGTHS, lens_k=(50, 9, 400, 0, 64, 333), heads_q=2 * ratio, heads_kv=2, **mask.options)
    for d in (64, 128, 192, 256)
    for mask in KERNEL_MASKS
    for ratio in RATIOS
)
def test_ratios_of_sequences_of_different_lengths(case: Case) -> None:
    """Packed without being told to, whatever the longest sequence is."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))
