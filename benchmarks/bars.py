"""The speeds that are demanded, and whether a result of the suite fwd reaches them.

A bar over a set of shapes is judged only where all of them were measured beside all of the peers that it names.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from . import peers
from .shapes import LONGEST, SETS

Row = dict[str, Any]

#: head_dim -> least speed on the shapes of the set "bars", in units of cuDNN's.
LEAST_CUDNN_RATIO = {64: 0.95, 128: 1.02, 256: 0.95}
#: Peers that the front is the best of, beside the estimate for FlashAttention-3.
FRONT = ("cudnn", "fa4")
#: In units of the front: mean and least over all shapes, mean at head dim 64, mean over sequences up to 1024.
LEAST_FRONT_MEAN, LEAST_FRONT, LEAST_FRONT_D64, LEAST_FRONT_SHORT = 1.05, 0.97, 1.10, 1.15
#: In units of FlashAttention-4, for windows and batches of different lengths.
LEAST_FA4_RATIO = 1.1
#: Time for each visible pair, in units of the dense counterpart's.
MOST_DENSE_TIME = 1.25
#: Speed of the longest shape in units of its counterpart's.
LEAST_LONG_RATIO = 0.98


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a bar holds: what was compared, the value, and its limit."""

    bar: str
    holds: bool
    text: str


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """The verdicts on all bars that these rows allow."""
    return [*_errors(rows), *_cudnn(rows), *_front(rows), *_masks_and_lengths(rows), *_longest(rows)]


def _errors(rows: Iterable[Row]) -> list[Verdict]:
    """Wrong results only: right ones go without saying."""
    wrong = [(row["name"], row["results"][peers.OURS]) for row in rows if row["results"][peers.OURS]["wrong"]]
    return [Verdict("error", False, f"{name}: relative error {ours['relative_error']:.1e}") for name, ours in wrong]


def _cudnn(rows: Iterable[Row]) -> list[Verdict]:
    least = {shape.name: LEAST_CUDNN_RATIO[shape.head_dim] for shape in SETS["bars"]}
    return [
        _at_least("cudnn", f"{row['name']}, x cuDNN", row["ratios"]["cudnn"], least[row["name"]])
        for row in rows
        if row["name"] in least and "cudnn" in row["ratios"]
    ]


def _front(rows: Iterable[Row]) -> list[Verdict]:
    by_name = {row["name"]: row for row in rows if all(peer in row["ratios"] for peer in FRONT)}
    shapes = SETS["peers"]
    if any(shape.name not in by_name for shape in shapes):
        return []
    ratios = {shape: by_name[shape.name]["front"]["ratio"] for shape in shapes}
    slowest = min(shapes, key=ratios.__getitem__)
    d64 = [ratio for shape, ratio in ratios.items() if shape.head_dim == 64]
    short = [ratio for shape, ratio in ratios.items() if shape.seqlen <= 1024]
    return [
        _at_least("B1", f"{len(shapes)} shapes, geometric mean x front", _mean(ratios.values()), LEAST_FRONT_MEAN),
        _at_least("B1", f"the least, {slowest.name}, x front", ratios[slowest], LEAST_FRONT),
        _at_least("B2", "head dim 64, geometric mean x front", _mean(d64), LEAST_FRONT_D64),
        _at_least("B3", "S = 512 and 1024, geometric mean x front", _mean(short), LEAST_FRONT_SHORT),
    ]


def _masks_and_lengths(rows: Iterable[Row]) -> list[Verdict]:
    names = {shape.name for shape in SETS["b4"]}
    verdicts = []
    for row in rows:
        if row["name"] not in names:
            continue
        if "fa4" in row["ratios"]:
            verdicts.append(
                _at_least("B4", f"{row['name']}, x FlashAttention-4", row["ratios"]["fa4"], LEAST_FA4_RATIO)
            )
        time = row["counterpart"]["relative_pair_time"]
        text = f"{row['name']}, time for a pair x dense"
        verdicts.append(Verdict("B4", time <= MOST_DENSE_TIME, f"{text}: {time:.3f}, at most {MOST_DENSE_TIME}"))
    return verdicts


def _longest(rows: Iterable[Row]) -> list[Verdict]:
    found = [row for row in rows if row["name"] == LONGEST.name and "counterpart" in row]
    return [
        _at_least(
            "B7",
            f"{row['name']}, speed x that of {row['counterpart']['name']}",
            1.0 / row["counterpart"]["relative_pair_time"],
            LEAST_LONG_RATIO,
        )
        for row in found
    ]


def _at_least(bar: str, text: str, value: float, least: float) -> Verdict:
    return Verdict(bar, value >= least, f"{text}: {value:.3f}, at least {least}")


def _mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))
