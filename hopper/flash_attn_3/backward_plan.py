"""The planner of the backward pass: problem -> kernel configuration and launch shape, and the layout of its scratch.

Pure Python, no tensors, no CUDA.
"""

from __future__ import annotations

import dataclasses
import functools

from .backward_config import (
    BACKWARD_HEAD_DIM_TILES,
    FP32_BYTES,
    Accumulation,
    BackwardConfig,
    DqPath,
    WarpgroupSplit,
    max_columns_by_keys,
)
from .block_range import query_block_range
from .config import Mask, Score
from .problem import ForwardProblem
from .sections import heads_that_end_evenly

#: Widest head dim that can be differentiated.
MAX_BACKWARD_HEAD_DIM = BACKWARD_HEAD_DIM_TILES[-1]
#: q, dout and dq of the heads worked on together are at most this many bytes (at least one head's), so that they stay
#: in the L2 cache: it has 50 MB, in two halves that each hold what their own multiprocessors read, and holds the next
#: section's, too. Of the heads that share keys one counts, since they take turns.
L2_QUERY_BYTES = 8 * 2**20
#: Where additions are ordered, so many tiles of a head are worked on at a time. More would find their queries in the
#: cache more often, but begin one after the other (`python -m benchmarks.models key_tiles`).
ORDERED_TILES_OF_A_HEAD = 3


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """Query rows and keys of one step of the main loop, and how warpgroups share it."""

    split: WarpgroupSplit
    dq_path: DqPath
    block_m: int
    block_n: int
    num_dout_stages: int = 2


@dataclasses.dataclass(frozen=True)
class BackwardProblem:
    """One backward call, as far as the planner cares: the forward call that it belongs to, and how it may add up."""

    forward: ForwardProblem
    accumulation: Accumulation


@dataclasses.dataclass(frozen=True)
class BackwardPlan:
    """The planner's answer.

    Attributes:
        config: the kernels.
        num_ctas: persistent CTAs of the main kernel to launch, whole clusters: one CTA on each multiprocessor, as far
            as there are blocks of keys, and one cluster at least.
        heads_per_section: how many (batch, key head) pairs are worked on together: few, so that the blocks of keys of
            one head, which read the same queries and add to the same dq, find them in the L2 cache.
        least_heads_in_last_section: so many, or all, are worked on together at the end of the launch, so that it
            ends with short tiles.
    """

    config: BackwardConfig
    num_ctas: int
    heads_per_section: int
    least_heads_in_last_section: int

    def dq_scratch_floats(self, rows: int) -> int:
        """fp32 elements of scratch that the kernels need for dq.

        Args:
            rows: rows of statistics, of all heads and sequences together.
        """
        config = self.config
        turns = rows // config.block_m * config.num_dq_parts
        return rows * config.head_dim + (turns if config.takes_turns else 0)


@functools.lru_cache(maxsize=4096)
def plan_backward(problem: BackwardProblem) -> BackwardPlan:
    """Choose the kernel and the launch shape. The result depends on nothing but the problem."""
    forward = problem.forward
    head_dim, head_dim_v = backward_head_dim_tiles(forward.head_dim, forward.head_dim_v)
    tile = backward_tile(forward.head_dim, forward.head_dim_v, forward.score)
    config = BackwardConfig(
        dtype=forward.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=forward.mask.mask,
        seq_layout=forward.seq_layout,
        score=forward.score,
        accumulation=problem.accumulation,
        **dataclasses.asdict(tile),
    )
    num_workers = max(1, forward.num_sms // config.cluster_size)
    key_blocks = -(-forward.max_seqlen_k // config.block_n) * forward.batch * forward.heads_kv
    return BackwardPlan(
        config,
        max(1, min(num_workers, key_blocks)) * config.cluster_size,
        _heads_per_section(problem, config, num_workers),
        _least_heads_in_last_section(forward, config, num_workers),
    )


def backward_head_dim_tiles(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The (q/k, v) tile widths that serve these head dims. Raises ValueError where none does."""
    if max(head_dim, head_dim_v) > MAX_BACKWARD_HEAD_DIM:
        limit = f"the backward pass has at most {MAX_BACKWARD_HEAD_DIM}"
        raise ValueError(f"head_dim={head_dim} with head_dim_v={head_dim_v} is not supported; {limit}")
    tile, tile_v = (next(t for t in BACKWARD_HEAD_DIM_TILES if x <= t) for x in (head_dim, head_dim_v))
    return tile, tile_v


def backward_tile(head_dim: int, head_dim_v: int, score: Score) -> BackwardTile:
    """The tile for the caller's head dims. Raises ValueError where there is none."""
    tiles = backward_head_dim_tiles(head_dim, head_dim_v)
    if max(tiles) == 64 and score is Score.SCALED:
        return BackwardTile(WarpgroupSplit.KEYS, DqPath.STAGED, block_m=128, block_n=128)
    if sum(tiles) <= max_columns_by_keys(score):
        return BackwardTile(WarpgroupSplit.KEYS, DqPath.STAGED, block_m=64, block_n=128)
    if tiles[0] % 128 == 0:
        return BackwardTile(WarpgroupSplit.COLUMNS, DqPath.DIRECT, block_m=64, block_n=128, num_dout_stages=1)
    return BackwardTile(WarpgroupSplit.COLUMNS, DqPath.DIRECT, block_m=64, block_n=64)


def _heads_per_section(problem: BackwardProblem, config: BackwardConfig, num_workers: int) -> int:
    """As many as fit in the L2 cache; in order at least so many that few of a head's tiles wait for each other."""
    forward = problem.forward
    row_bytes = (forward.head_dim + forward.head_dim_v) * config.dtype.num_bytes + config.head_dim * FP32_BYTES
    heads = L2_QUERY_BYTES // (max(1, forward.max_seqlen_q) * row_bytes)
    if problem.accumulation is Accumulation.ORDERED:
        heads = max(heads, -(-num_workers // ORDERED_TILES_OF_A_HEAD))
    return max(1, min(heads, forward.batch * forward.heads_kv))


def _least_heads_in_last_section(problem: ForwardProblem, config: BackwardConfig, num_workers: int) -> int:
    """So many, or all, are worked on together at the end. A tile takes as long as it is seen by blocks of queries."""
    if problem.mask.mask is Mask.FULL or problem.max_seqlen_q == 0 or problem.max_seqlen_k == 0:
        return 1

    def query_blocks(n_block: int) -> int:
        blocks = (n_block, config.block_m, config.block_n)
        tile = query_block_range(problem.mask, *blocks, problem.max_seqlen_q, problem.max_seqlen_k)
        return tile.end - tile.begin

    return heads_that_end_evenly(query_blocks, -(-problem.max_seqlen_k // config.block_n), num_workers)


# -- row statistics: one float per query row and head, in scratch whose sequences begin at multiples of block_m ------


def padded_rows(num_rows: int, num_sequences: int, block_m: int) -> int:
    """Rows of scratch, per head, that packed sequences of ``num_rows`` rows in total need, whatever their lengths."""
    return round_up(num_rows + num_sequences * block_m, block_m)


def padded_offset(first_row: int, sequence: int, block_m: int) -> int:
    """Where a packed sequence begins in the scratch, given its first row and its index.

    A multiple of block_m; the sequence's last block, filled up, ends before the next sequence begins.
    """
    return (first_row + sequence * block_m) // block_m * block_m


def round_up(rows: int, block_m: int) -> int:
    """Whole blocks of block_m rows."""
    return -(-rows // block_m) * block_m
