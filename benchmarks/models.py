"""Models behind entries of LOG.md: what can be said of a kernel without a GPU.

python -m benchmarks.models accumulator    # what a truncating accumulator makes of very long sums; 20 s
python -m benchmarks.models balance        # how evenly launches end whose tiles differ
python -m benchmarks.models blocks         # what is computed for nothing at the edges of masks
python -m benchmarks.models key_tiles      # memory traffic and waiting in the backward pass; 30 s
python -m benchmarks.models limits         # which unit limits a block of keys
python -m benchmarks.models varlen         # what the order of sequences of different lengths saves and costs
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import math
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from benchmarks import limits, model_problems, varlen_order
from benchmarks.key_tiles import Launch, simulate
from benchmarks.model_problems import CAUSAL, model_problem, sections
from flash_attn_3.backward_config import Accumulation
from flash_attn_3.block_range import block_range, row_keys
from flash_attn_3.config import WARPGROUP_ROWS, ForwardConfig, Mask
from flash_attn_3.heuristics import MAX_VALUE_TILE, ForwardPlan, plan_forward
from flash_attn_3.problem import HOPPER_SMS, MaskSpec

HEAD_DIM, ROWS, MMA_DEPTH = 64, 8, 16
KEY_TILE_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
#: What a tile costs beside its key blocks, in key blocks.
TILE_OVERHEAD = 0.7


def truncated(x: np.ndarray) -> np.ndarray:
    """To 24 bits of mantissa, towards zero."""
    nearest = x.astype(np.float32)
    too_large = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(too_large, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


def accumulate(num_keys: int, keys_per_level: int) -> tuple[float, float]:
    """(scale, cosine distance) of a random output whose accumulator is truncated after each 16 keys.

    After every `keys_per_level` keys it is added to a second level, which rounds, and begins anew.
    """
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((ROWS, num_keys))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact, accumulator = np.zeros((ROWS, HEAD_DIM)), np.zeros((ROWS, HEAD_DIM))
    second = np.zeros((ROWS, HEAD_DIM), dtype=np.float32)
    for key in range(0, num_keys, MMA_DEPTH):
        product = weights[:, key : key + MMA_DEPTH] @ draw.standard_normal((MMA_DEPTH, HEAD_DIM))
        exact += product
        accumulator = truncated(accumulator + product)
        if (key + MMA_DEPTH) % keys_per_level == 0:
            second += accumulator.astype(np.float32)
            accumulator[:] = 0.0
    found = second + accumulator
    dot = (found * exact).sum()
    return dot / (exact**2).sum(), 1.0 - dot / math.sqrt((found**2).sum() * (exact**2).sum())


def planned(head_dim: int, seqlen: int, mask: MaskSpec = CAUSAL) -> ForwardPlan:
    """The planner's answer to a problem of the models' size."""
    return plan_forward(model_problem(head_dim, seqlen, mask))


def num_tiles(head_dim: int, seqlen: int, mask: MaskSpec = CAUSAL) -> tuple[int, int]:
    """(query blocks of a head, heads of all sequences) of that problem."""
    block_m = planned(head_dim, seqlen, mask).config.block_m
    return -(-seqlen // block_m), model_problems.num_heads(head_dim, seqlen)


def in_sections(num_m_blocks: int, num_heads: int, heads: int, least_last: int) -> Iterator[int]:
    """Query blocks in the order in which tiles are handed out: of each section the longest first."""
    for section in sections(num_heads, heads, least_last):
        for m_block in reversed(range(num_m_blocks)):
            yield from (m_block for _ in section)


def head_by_head(num_m_blocks: int, num_heads: int) -> Iterator[int]:
    """Query blocks in the order of full launches."""
    return (m_block for _ in range(num_heads) for m_block in range(num_m_blocks))


def occupancy(head_dim: int, seqlen: int, m_blocks: Iterable[int], mask: MaskSpec = CAUSAL) -> float:
    """Share of a launch's time in which its multiprocessors work, each taking the next tile when it is free.

    m_blocks: the query block of each tile, in the order in which they are handed out.
    """
    config = planned(head_dim, seqlen, mask).config
    free_at, work = [0.0] * HOPPER_SMS, 0.0
    for m_block in m_blocks:
        blocks = block_range(mask, m_block, config.block_m, config.block_n, seqlen, seqlen)
        cost = TILE_OVERHEAD + blocks.end - blocks.begin
        heapq.heapreplace(free_at, free_at[0] + cost)
        work += cost
    return work / HOPPER_SMS / max(free_at)


def pairs_computed(config: ForwardConfig, seqlen: int, mask: MaskSpec, rows_that_share: int, halves: bool) -> float:
    """(query, key) pairs that a head's tiles compute, over those that see each other.

    rows_that_share: so many rows of a tile visit the same blocks of keys: its own, or a warpgroup's.
    halves: whether they leave out the second half of the last block, but not of the only one, where they can.
    """
    computed, visible = 0, sum(len(row_keys(mask, row, seqlen, seqlen)) for row in range(seqlen))
    for first_row in range(0, -(-seqlen // config.block_m) * config.block_m, rows_that_share):
        keys = config.block_n  # at least, also by a warpgroup without a row
        if first_row < seqlen:
            tile = (first_row // rows_that_share, rows_that_share, config.block_n)
            blocks = block_range(mask, *tile, seqlen, seqlen)
            last_key = row_keys(mask, min(seqlen, first_row + rows_that_share) - 1, seqlen, seqlen).stop
            keys = max(keys, (blocks.end - blocks.begin) * config.block_n)
            in_first_half = last_key <= (blocks.end - 1) * config.block_n + config.half_keys
            if halves and in_first_half and keys > config.block_n:
                keys -= config.block_n - config.half_keys
        computed += keys * rows_that_share
    return computed / visible


def print_accumulator() -> None:
    for keys_per_level in (2**22, 2**18):
        scale, distance = accumulate(2**22, keys_per_level)
        print(f"2^22 keys, {keys_per_level} a level: scale {scale:.4f}, cosine distance {distance:.1e}")


def print_pairs() -> None:
    print(
        "mask, tile, S: pairs computed for each visible one; blocks chosen for a tile, for a warpgroup, and with halves"
    )
    window = MaskSpec(Mask.LOCAL, 1024, 0)
    cases = [(MaskSpec(Mask.FULL), 192, 128, 512)]
    cases += [(CAUSAL, *tile, s) for tile in ((192, 128), (128, 128), (128, 80)) for s in (512, 1024, 2048, 8192)]
    cases += [(window, *tile, 16384) for tile in ((128, 128), (128, 64))]
    for mask, block_m, block_n, seqlen in cases:
        config = dataclasses.replace(planned(64, seqlen).config, block_m=block_m, block_n=block_n)
        choices = (block_m, False), (WARPGROUP_ROWS, False), (WARPGROUP_ROWS, True)
        shares = "; ".join(f"{pairs_computed(config, seqlen, mask, *choice):.3f}" for choice in choices)
        print(f"{mask.mask.slug}, {block_m} x {block_n}, {seqlen}: {shares}")


def print_balance() -> None:
    print("head dim, S: occupancy with the planner's sections but for the last one's size; with 5 heads each; with all")
    for head_dim in (64, 128, 256):
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
            plan, tiles = planned(head_dim, seqlen), num_tiles(head_dim, seqlen)
            choices = (plan.heads_per_section, 0), (5, 0), (plan.heads_per_section, plan.least_heads_in_last_section)
            shares = "; ".join(f"{occupancy(head_dim, seqlen, in_sections(*tiles, *c)):.3f}" for c in choices)
            print(f"{head_dim}, {seqlen}: {shares}")
    print("head dim, S, window: the same head by head, from the first query block on; with the planner's sections")
    for head_dim, window in itertools.product((64, 128, 256), (1024, 4096, 8192)):
        mask = MaskSpec(Mask.LOCAL, window, 0)
        plan, tiles = planned(head_dim, 16384, mask), num_tiles(head_dim, 16384, mask)
        orders = head_by_head(*tiles), in_sections(*tiles, plan.heads_per_section, plan.least_heads_in_last_section)
        shares = "; ".join(f"{occupancy(head_dim, 16384, order, mask):.3f}" for order in orders)
        print(f"{head_dim}, 16384, {window}: {shares}")


def print_key_tiles() -> None:
    print("head dim, mask, S: GB moved and us, all heads together; with the planner's sections; the same in order;")
    print("in order, one head after the other")
    for head_dim, mask, seqlen in itertools.product((64, 128, 256), (MaskSpec(Mask.FULL), CAUSAL), KEY_TILE_SEQLENS):
        unordered = Launch(head_dim, seqlen, mask)
        ordered = dataclasses.replace(unordered, accumulation=Accumulation.ORDERED)
        outcomes = [
            simulate(unordered, unordered.all_heads_together()),
            simulate(unordered, unordered.in_planned_sections()),
            simulate(ordered, ordered.in_planned_sections()),
            simulate(ordered, ordered.in_sections(1, 0)),
        ]
        shown = "; ".join(f"{x.bytes_moved / 1e9:.2f} GB {x.microseconds:.0f} us" for x in outcomes)
        print(f"{head_dim}, {mask.mask.slug}, {seqlen}: {shown}")


def print_limits() -> None:
    print("| head dim | tile | tensor cores | exponentials | shared memory | issue slots |")
    for tile in limits.TILES:
        print(limits.table_row(*tile, MAX_VALUE_TILE))


def print_varlen() -> None:
    print("us as given; every 32 sequences sorted; by classes of lengths, too; all sorted, at no cost")
    orders = varlen_order.as_given, varlen_order.by_groups, varlen_order.by_classes, varlen_order.all_sorted
    for batch in varlen_order.batches():
        shown = "; ".join(f"{varlen_order.microseconds(batch, order):.0f}" for order in orders)
        print(f"{batch.name}: {shown}")


MODELS = {
    "accumulator": print_accumulator,
    "balance": print_balance,
    "blocks": print_pairs,
    "key_tiles": print_key_tiles,
    "limits": print_limits,
    "varlen": print_varlen,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    MODELS[parser.parse_args(arguments).model]()


if __name__ == "__main__":
    main(sys.argv[1:])
