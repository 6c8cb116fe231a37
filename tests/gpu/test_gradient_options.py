"""W6: masks, softcap, packed sequences, used lengths and ordered additions, each with each."""

from __future__ import annotations

import itertools

from .cases import KERNEL_MASKS, GradientCase, each
from .gradients import check_case
from .harness import make_tensors

#: Every way in which warpgroups share a tile; with a softcap there are fewer registers, hence other tiles.
HEAD_DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]
LENS_Q, LENS_K = (64, 1, 0, 130, 7), (100, 0, 17, 150, 65)
USED_Q, USED_K = (64, 1, 0, 100, 0), (99, 0, 1, 0, 64)
LAYOUTS = [
    {"seqlen_q": 130, "seqlen_k": 150},
    {"lens_q": LENS_Q, "lens_k": LENS_K},
]


def _cross_product() -> list[GradientCase]:
    """Dense calls know no used lengths but by the raw operator, which takes all but the log-sum-exp's gradient."""
    return [
        GradientCase(
            d,
            dv,
            **({"batch": len(LENS_Q)} | lengths),
            softcap=softcap,
            used_q=used_q,
            used_k=used_k,
            deterministic=deterministic,
            with_dlse="lens_q" in lengths,
            **mask.options,
        )
        for (d, dv), lengths, mask, softcap, used_q, used_k, deterministic in itertools.product(
            HEAD_DIMS, LAYOUTS, KERNEL_MASKS, (0.0, 15.0), (None, USED_Q), (None, USED_K), (False, True)
        )
    ]


@each(_cross_product())
def test_w6_every_option_with_every_other(case: GradientCase) -> None:
    check_case(case, make_tensors(case))
