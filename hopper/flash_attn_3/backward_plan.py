"""The planner of the backward pass: problem -> kernel configuration and launch shape, and the layout of its scratch.

Pure Python, no tensors, no CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

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
from .sections import MAX_TILES_LOOKED_AT, heads_that_end_evenly

#: Widest head dim that can be differentiated.
MAX_BACKWARD_HEAD_DIM = BACKWARD_HEAD_DIM_TILES[-1]
#: q, dout and dq of the heads worked on together are at most this many bytes (at least one head's), so that they stay
#: in the L2 cache: it has 50 MB, in two halves that each hold what their own multiprocessors read, and holds the next
#: section's, too. Of the heads that share keys one counts, since they take turns.
L2_QUERY_BYTES = 8 * 2**20
#: Where additions are ordered, so many tiles of a head are worked on at a time. More would find their queries in the
#: cache more often, but begin one after the other (`python -m benchmarks.models key_tiles`).
ORDERED_TILES_OF_A_HEAD = 3
#: With so many tiles a worker, no part of them is idle for long.
TILES_OF_A_WORKER_ENOUGH = 8
#: Longer by so much is no reason for more parts, whose gradients take a way through memory.
NEARLY = 1.1


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
        group_parts: parts of the query heads that share keys, each of which has tiles of its own: 1, or where the
            blocks of keys alone would leave multiprocessors idle, a divisor of the heads. Their dk and dv are added
            up behind.
        num_ctas: persistent CTAs of the main kernel to launch, whole clusters: one CTA on each multiprocessor, as far
            as there are blocks of keys, and one cluster at least.
        heads_per_section: how many parts of (batch, key head) pairs are worked on together: few, so that the blocks of
            keys of one, which read the same queries and add to the same dq, find them in the L2 cache.
        least_heads_in_last_section: so many, or all, are worked on together at the end of the launch, so that it
            ends with short tiles.
    """

    config: BackwardConfig
    group_parts: int
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

    def key_part_floats(self, num_key_blocks: int) -> int:
        """fp32 elements of scratch for dk and dv of each tile, where several are added up; otherwise 0.

        Args:
            num_key_blocks: blocks of keys of all key heads (`num_blocks`).
        """
        config = self.config
        part = config.block_n * (config.head_dim + config.head_dim_v)
        return num_key_blocks * self.group_parts * part if self.group_parts > 1 else 0


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
    group_parts = _group_parts(forward, config, num_workers)
    num_tiles = -(-forward.max_seqlen_k // config.block_n) * forward.batch * forward.heads_kv * group_parts
    return BackwardPlan(
        config,
        group_parts,
        max(1, min(num_workers, num_tiles)) * config.cluster_size,
        _heads_per_section(problem, config, num_workers, group_parts),
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


def _group_parts(problem: ForwardProblem, config: BackwardConfig, num_workers: int) -> int:
    """As few as keep all workers busy nearly as well as a tile for each query head would.

    A launch takes at least as long as its longest tile, and as all tiles together, shared out evenly; half a tile is
    added for those that end last.
    """
    blocks = -(-problem.max_seqlen_k // config.block_n)
    num_tiles = blocks * problem.batch * problem.heads_kv
    group = problem.heads_q // max(1, problem.heads_kv)
    if group <= 1 or not 0 < num_tiles < TILES_OF_A_WORKER_ENOUGH * num_workers or problem.max_seqlen_q == 0:
        return 1
    steps = _tile_steps(problem, config)
    looked_at = [max(1, steps(block)) for block in range(0, blocks, -(-blocks // MAX_TILES_LOOKED_AT))]
    longest, mean = max(looked_at), sum(looked_at) / len(looked_at)

    def duration(parts: int) -> float:
        return max(longest / parts, num_tiles * mean / num_workers + mean / (2 * parts))

    return next(x for x in range(1, group + 1) if group % x == 0 and duration(x) <= NEARLY * duration(group))


def _heads_per_section(problem: BackwardProblem, config: BackwardConfig, num_workers: int, group_parts: int) -> int:
    """As many as fit in the L2 cache; in order at least so many that few of a head's tiles wait for each other."""
    forward = problem.forward
    row_bytes = (forward.head_dim + forward.head_dim_v) * config.dtype.num_bytes + config.head_dim * FP32_BYTES
    heads = L2_QUERY_BYTES // (max(1, forward.max_seqlen_q) * row_bytes)
    if problem.accumulation is Accumulation.ORDERED:
        heads = max(heads, -(-num_workers // ORDERED_TILES_OF_A_HEAD))
    return max(1, min(heads, forward.batch * forward.heads_kv * group_parts))


def _least_heads_in_last_section(problem: ForwardProblem, config: BackwardConfig, num_workers: int) -> int:
    """So many, or all, are worked on together at the end. A tile takes as long as it is seen by blocks of queries."""
    if problem.mask.mask is Mask.FULL or problem.max_seqlen_q == 0 or problem.max_seqlen_k == 0:
        return 1
    num_blocks = -(-problem.max_seqlen_k // config.block_n)
    return heads_that_end_evenly(_tile_steps(problem, config), num_blocks, num_workers)


def _tile_steps(problem: ForwardProblem, config: BackwardConfig) -> Callable[[int], int]:
    """Blocks of queries that see a block of keys, of one query head in the longest sequence."""

    def steps(n_block: int) -> int:
        blocks = (n_block, config.block_m, config.block_n)
        tile = query_block_range(problem.mask, *blocks, problem.max_seqlen_q, problem.max_seqlen_k)
        return tile.end - tile.begin

    return steps


# -- row statistics: one float per query row and head, in scratch whose sequences begin at multiples of block_m ------


def padded_rows(num_rows: int, num_sequences: int, block_m: int) -> int:
    """Rows of scratch, per head, that packed sequences of ``num_rows`` rows in total need, whatever their lengths."""
    return round_up(num_rows + num_sequences * block_m, block_m)


def padded_offset(first_row: int, sequence: int, block_m: int) -> int:
    """Where a packed sequence begins in the scratch, given its first row and its index.

    A multiple of block_m; the sequence's last block, filled up, ends before the next sequence begins.
    """
    return (first_row + sequence * block_m) // block_m * block_m


def num_blocks(num_rows: int, num_sequences: int, block_rows: int, packed: bool) -> int:
    """Blocks of one head of all sequences.

    Args:
        num_rows: of each sequence; with ``packed`` of all together, and the blocks are enough for any lengths.
    """
    if packed:
        return num_rows // block_rows + num_sequences
    return -(-num_rows // block_rows) * num_sequences


def round_up(rows: int, block_m: int) -> int:
    """Whole blocks of block_m rows."""
    return -(-rows // block_m) * block_m
