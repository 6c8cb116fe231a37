"""Each value of each axis of the tuner's, by a tile that differs from the table's in as little as can be."""

from __future__ import annotations

import torch

from .cases import Case, each
from .first_run import CALLS
from .tiles import TileCase, cases_along_axes, run_tile_case

HEAD_DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]
LENS = {"lens_q": (300, 0, 1, 200), "lens_k": (130, 5, 0, 300), "heads_q": 4, "heads_kv": 1}
#: At head dim 128.
MEETING_OPTIONS = [
    Case(128, **LENS, spare_q=3, spare_k=70, window_size=(100, 20), dtype=torch.float16),
    Case(128, **LENS, used_q=(300, 0, 1, 65), used_k=(99, 5, 0, 129), causal=True, softcap=15.0),
    Case(120, batch=2, seqlen_q=300, seqlen_k=259, causal=True, nan_keys=(129,)),  # rows without a key
]


def _along_axes(cases: list[Case]) -> list[TileCase]:
    """For each value one tile; two values may have the same."""
    return list(dict.fromkeys(step for case in cases for step in cases_along_axes(case).values()))


@each(_along_axes([Case(d, dv, **options) for d, dv in HEAD_DIMS for options in CALLS.values()]))
def test_each_value_of_an_axis(case: TileCase) -> None:
    run_tile_case(case)


@each(_along_axes(MEETING_OPTIONS))
def test_with_options_that_meet(case: TileCase) -> None:
    run_tile_case(case)
