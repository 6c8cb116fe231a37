"""What is demanded of the results of each suite, and whether they reach it.

A bar over a set of shapes is judged only where all of them were measured beside all of the peers that it names.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import peers
from .shapes import LONGEST, SETS, AttentionShape

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

#: The backward pass in units of the front: mean and least over all shapes, mean at head dim 256.
LEAST_BACKWARD_MEAN, LEAST_BACKWARD, LEAST_BACKWARD_D256 = 1.05, 0.97, 1.15
#: Its deterministic mode in units of the default: mean over shapes of at least so many keys.
LEAST_DETERMINISTIC, DETERMINISTIC_SEQLEN = 0.92, 2048
#: Its speed for keys wider than values, in units of the better one of cuDNN and FlashAttention-4.
LEAST_WIDE_KEYS = 1.1

#: What compiling the kernels of one backward pass may take: seconds of one core, and resident memory.
MOST_COMPILE_SECONDS, MOST_COMPILE_BYTES = 10.0, 1_200_000_000


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a bar holds: what was compared, the value, and its limit."""

    bar: str
    holds: bool
    text: str


def failures(result: dict[str, Any]) -> list[str]:
    """What is wrong with a judged result."""
    return [f"{bar['bar']}: {bar['text']}" for bar in result["bars"] if not bar["holds"]]


def judge(suite: str, rows: Sequence[Row]) -> list[Verdict]:
    """The verdicts on all of a suite's bars that these rows allow."""
    return [verdict for bar in _BARS[suite] for verdict in bar(rows)]


def _errors(rows: Iterable[Row]) -> list[Verdict]:
    """What this package computes wrongly or not at all: right results go without saying."""
    found = []
    for row in rows:
        for name in peers.OWN:
            entry = row["results"].get(name, {})
            text = f"{row['name']}, {peers.LABELS[name]}"
            if "unavailable" in entry:
                found.append(Verdict("missing", False, f"{text}: {entry['unavailable']}"))
            elif entry.get("wrong"):
                found.append(Verdict("error", False, f"{text}: relative error {entry['relative_error']:.1e}"))
            if not entry.get("repeats", True):
                found.append(Verdict("error", False, f"{text}: two runs differ"))
    return found


# -- the forward pass ------------------------------------------------------------------------------------


def _cudnn(rows: Iterable[Row]) -> list[Verdict]:
    least = {shape.name: LEAST_CUDNN_RATIO[shape.head_dim] for shape in SETS["bars"]}
    return [
        _at_least("cudnn", f"{row['name']}, x cuDNN", row["ratios"]["cudnn"], least[row["name"]])
        for row in rows
        if row["name"] in least and "cudnn" in row["ratios"]
    ]


def _front(rows: Iterable[Row]) -> list[Verdict]:
    ratios = _front_ratios(rows)
    if not ratios:
        return []
    d64 = [ratio for shape, ratio in ratios.items() if shape.head_dim == 64]
    short = [ratio for shape, ratio in ratios.items() if shape.seqlen <= 1024]
    return [
        *_mean_and_least("B1", ratios, LEAST_FRONT_MEAN, LEAST_FRONT),
        _at_least("B2", "head dim 64, geometric mean x front", _mean(d64), LEAST_FRONT_D64),
        _at_least("B3", "S = 512 and 1024, geometric mean x front", _mean(short), LEAST_FRONT_SHORT),
    ]


def _front_ratios(rows: Iterable[Row]) -> dict[AttentionShape, float]:
    """Of the set "peers"; empty where a shape or a peer is missing."""
    by_name = {row["name"]: row for row in rows if all(peer in row["ratios"] for peer in FRONT)}
    if any(shape.name not in by_name for shape in SETS["peers"]):
        return {}
    return {shape: by_name[shape.name]["front"]["ratio"] for shape in SETS["peers"]}


def _mean_and_least(bar: str, ratios: dict[AttentionShape, float], mean: float, least: float) -> list[Verdict]:
    slowest = min(ratios, key=ratios.__getitem__)
    return [
        _at_least(bar, f"{len(ratios)} shapes, geometric mean x front", _mean(ratios.values()), mean),
        _at_least(bar, f"the least, {slowest.name}, x front", ratios[slowest], least),
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
        verdicts.append(_at_most("B4", f"{row['name']}, time for a pair x dense", time, MOST_DENSE_TIME))
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


# -- the backward pass -----------------------------------------------------------------------------------


def _backward_front(rows: Iterable[Row]) -> list[Verdict]:
    ratios = _front_ratios(rows)
    if not ratios:
        return []
    d256 = [ratio for shape, ratio in ratios.items() if shape.head_dim == 256]
    return [
        *_mean_and_least("C1", ratios, LEAST_BACKWARD_MEAN, LEAST_BACKWARD),
        _at_least("C2", "head dim 256, geometric mean x front", _mean(d256), LEAST_BACKWARD_D256),
    ]


def _deterministic(rows: Iterable[Row]) -> list[Verdict]:
    by_name = {row["name"]: row["ratios"].get(peers.DETERMINISTIC) for row in rows}
    shapes = [shape for shape in SETS["peers"] if shape.seqlen >= DETERMINISTIC_SEQLEN]
    if not all(by_name.get(shape.name) for shape in shapes):
        return []
    mean = 1.0 / _mean(by_name[shape.name] for shape in shapes)
    text = f"deterministic, {len(shapes)} shapes with S >= {DETERMINISTIC_SEQLEN}, geometric mean x default"
    return [_at_least("C3", text, mean, LEAST_DETERMINISTIC)]


def _wide_keys(rows: Iterable[Row]) -> list[Verdict]:
    """Against whichever of the peers takes these shapes; the text names it."""
    names = {shape.name for shape in SETS["c4"]}
    verdicts = []
    for row in rows:
        ratios = {peer: row["ratios"][peer] for peer in FRONT if peer in row["ratios"]}
        if row["name"] in names and ratios and all(peer in row["results"] for peer in FRONT):
            best = min(ratios, key=ratios.__getitem__)
            text = f"{row['name']}, x {peers.LABELS[best]}, the better of {len(ratios)}"
            verdicts.append(_at_least("C4", text, ratios[best], LEAST_WIDE_KEYS))
    return verdicts


# -- compilation -----------------------------------------------------------------------------------------


def _backward_kernels(rows: Iterable[Row]) -> list[Verdict]:
    rows = [row for row in rows if row["name"].startswith("bwd_")]
    if not rows:
        return []
    slowest = max(rows, key=lambda row: row["compile_cpu_seconds"])
    largest = max(rows, key=lambda row: row["compile_peak_bytes"])
    seconds, peak = slowest["compile_cpu_seconds"], largest["compile_peak_bytes"]
    return [
        _at_most("C6", f"{slowest['name']}, the slowest to compile, s of CPU time", seconds, MOST_COMPILE_SECONDS),
        _at_most("C6", f"{largest['name']}, the largest to compile, GB", peak / 1e9, MOST_COMPILE_BYTES / 1e9),
        _no_spills("C6", "backward", rows),
    ]


def _forward_kernels(rows: Iterable[Row]) -> list[Verdict]:
    rows = [row for row in rows if row["name"].startswith("fwd_")]
    return [_no_spills("B6", "forward", rows)] if rows else []


def _no_spills(bar: str, family: str, rows: Sequence[Row]) -> Verdict:
    spilling = [row["name"] for row in rows if _spilled(row) != 0]
    text = f"{len(rows)} {family} kernels without spills"
    return Verdict(bar, not spilling, f"{text}: but for {', '.join(spilling)}" if spilling else text)


def _spilled(row: Row) -> float:
    """Bytes of stores and loads; NaN where the compiler did not say."""
    parts = (row["spill_store_bytes"], row["spill_load_bytes"])
    return math.nan if None in parts else sum(parts)


_BARS: dict[str, tuple[Callable[[Sequence[Row]], list[Verdict]], ...]] = {
    "fwd": (_errors, _cudnn, _front, _masks_and_lengths, _longest),
    "bwd": (_errors, _backward_front, _deterministic, _wide_keys),
    "fwd+bwd": (_errors,),
    "compile": (_forward_kernels, _backward_kernels),
}


def _at_least(bar: str, text: str, value: float, least: float) -> Verdict:
    return Verdict(bar, value >= least, f"{text}: {value:.3f}, at least {least}")


def _at_most(bar: str, text: str, value: float, most: float) -> Verdict:
    return Verdict(bar, value <= most, f"{text}: {value:.3f}, at most {most}")


def _mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))
