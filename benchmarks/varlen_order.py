"""A model of forward launches whose lengths differ: what the order of sequences saves, and what finding it costs.

Each multiprocessor takes the next tile when it is free. Between two tiles it scans what lies between them, which is
hidden as far as the loads of the last one's end are still to be used.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Callable, Iterator, Sequence

from flash_attn_3.problem import HOPPER_SMS

#: Assumptions, in clocks: of a block of 128 keys, and of a tile beside its blocks, in blocks.
BLOCK_CLOCKS, TILE_OVERHEAD = 2500, 0.7
#: Assumptions, in clocks: until a length has come from the L2 cache; to sort 32 of them and count their tiles.
LOAD_CLOCKS, SORT_CLOCKS = 750, 1300
#: Lengths of so many groups are asked for at once when the batch is looked over at first.
GROUPS_AT_ONCE = 4
HIDDEN_BLOCKS = 2
BLOCK_ROWS = 128
CLOCKS_PER_MICROSECOND = 1700
#: As in csrc/kernels/core/length_classes.cuh.
MOST_CLASSES, FEW_KEYS = 5, 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Query and key lengths of sequences, each with `heads` heads; causal."""

    name: str
    lengths: Sequence[tuple[int, int]]
    heads: int = 8


#: (sequence, clocks of scanning until it is found), in the order in which sequences are handed out.
Order = Iterator[tuple[int, int]]


def octave(length: int) -> int:
    return max(1, length).bit_length() - 1


def by_groups(batch: Batch) -> Order:
    """Of every 32 sequences those with the most keys first."""
    return _passes(batch, [0] * len(batch.lengths), most_keys=True, clocks=0)


def as_given(batch: Batch) -> Order:
    return _passes(batch, [0] * len(batch.lengths), most_keys=False, clocks=0)


def by_classes(batch: Batch) -> Order:
    """The scheduler's: the same, once for each class of lengths, the longest first."""
    keys = [length for _, length in batch.lengths]
    few = octave(max(FEW_KEYS, len(keys)))
    if len(keys) <= 32 or octave(max(keys)) <= few:
        return by_groups(batch)
    last = max(few, octave(max(keys)) - (MOST_CLASSES - 1))
    clocks = -(-len(keys) // (32 * GROUPS_AT_ONCE)) * LOAD_CLOCKS
    return _passes(batch, [max(last, octave(n)) for n in keys], most_keys=True, clocks=clocks)


def all_sorted(batch: Batch) -> Order:
    """What no scan reaches: those with the most keys first, at no cost."""
    return ((b, 0) for b in sorted(range(len(batch.lengths)), key=lambda b: -batch.lengths[b][1]))


def _passes(batch: Batch, classes: Sequence[int], most_keys: bool, clocks: int) -> Order:
    several = len(set(classes)) > 1
    for present in sorted(set(classes), reverse=True):
        for begin in range(0, len(classes), 32):
            found = [b for b in range(begin, min(begin + 32, len(classes))) if classes[b] == present]
            clocks += LOAD_CLOCKS if several else 0
            if not found:
                continue
            clocks += LOAD_CLOCKS + SORT_CLOCKS
            for b in sorted(found, key=lambda b: -(batch.lengths[b][1] // 16) if most_keys else b):
                yield b, clocks


def microseconds(batch: Batch, order: Callable[[Batch], Order]) -> float:
    """Of a launch."""
    free = [(0.0, 0, 0.0)] * HOPPER_SMS  # when, clocks scanned until then, those that can be hidden
    end = 0.0
    for sequence, scanned in order(batch):
        len_q, len_k = batch.lengths[sequence]
        for last_row in range(-(-len_q // BLOCK_ROWS) * BLOCK_ROWS, 0, -BLOCK_ROWS):
            blocks = -(-max(1, min(len_k, len_k - len_q + last_row)) // BLOCK_ROWS)
            work = (TILE_OVERHEAD + blocks) * BLOCK_CLOCKS
            for _ in range(batch.heads):
                time, before, hidden = free[0]
                done = time + max(0.0, scanned - before - hidden) + work
                heapq.heapreplace(free, (done, scanned, min(work, HIDDEN_BLOCKS * BLOCK_CLOCKS)))
                end = max(end, done)
    return end / CLOCKS_PER_MICROSECOND


def batches() -> Iterator[Batch]:
    """One long sequence at the end; then lengths that differ little, much, or very much."""
    draw = random.Random(0)
    yield Batch("32 of 1000 keys, then one of 131072", [(128, 1000)] * 32 + [(128, 131072)])
    for size in (64, 256, 1024):
        yield Batch(f"{size} of 2048 keys", [(64, 2048)] * size)
        yield Batch(f"{size} of 1 to 512 keys", [(64, draw.randint(1, 512)) for _ in range(size)])
        yield Batch(f"{size} of 1 to 8192 keys", [(64, draw.randint(1, 8192)) for _ in range(size)])
        yield Batch(f"{size} of 1 to 8192 keys, rising", [(64, 1 + 8192 * i // size) for i in range(size)])
        for median, spread in ((2000, 1.0), (1000, 1.5)):
            keys = [max(1, min(131072, int(median * draw.lognormvariate(0, spread)))) for _ in range(size)]
            yield Batch(f"{size} of about {median} keys, log-normal, sigma {spread}", [(64, n) for n in keys])
        lengths = [max(1, min(8192, int(300 * draw.lognormvariate(0, 1)))) for _ in range(size)]
        yield Batch(f"{size} of about 300 queries and keys, log-normal, sigma 1", [(n, n) for n in lengths])
