"""The planner of the backward pass: problem -> kernel configuration and launch shape, and the layout of its scratch.

Pure Python, no tensors, no CUDA.
"""

from __future__ import annotations

import dataclasses
import functools

from .backward_config import (
    BACKWARD_HEAD_DIM_TILES,
    Accumulation,
    BackwardConfig,
    DqPath,
    WarpgroupSplit,
    max_columns_by_keys,
)
from .config import Score
from .heuristics import MAX_TILES
from .problem import ForwardProblem

#: Widest head dim that can be differentiated.
MAX_BACKWARD_HEAD_DIM = BACKWARD_HEAD_DIM_TILES[-1]


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
        num_tiles: blocks of keys over all query heads and sequences (0: no key, or no query head).
    """

    config: BackwardConfig
    num_tiles: int

    def dq_scratch_floats(self, rows: int) -> int:
        """fp32 elements of scratch that the kernels need for dq.

        Args:
            rows: rows of statistics, of all heads and sequences together.
        """
        config = self.config
        turns = rows // config.block_m * config.num_dq_parts
        return rows * config.head_dim + (turns if config.accumulation is Accumulation.ORDERED else 0)


@functools.lru_cache(maxsize=4096)
def plan_backward(problem: BackwardProblem) -> BackwardPlan:
    """Choose the kernel and the launch shape. The result depends on nothing but the problem."""
    forward = problem.forward
    head_dim, head_dim_v = backward_head_dim_tiles(forward.head_dim, forward.head_dim_v)
    tile = backward_tile(forward.head_dim, forward.head_dim_v, forward.score, problem.accumulation)
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
    num_tiles = _checked_tiles(forward, "max_seqlen_k", config.block_n, "keys")
    _checked_tiles(forward, "max_seqlen_q", config.block_m, "query rows")
    return BackwardPlan(config, num_tiles)


def backward_head_dim_tiles(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The (q/k, v) tile widths that serve these head dims. Raises ValueError where none does."""
    if max(head_dim, head_dim_v) > MAX_BACKWARD_HEAD_DIM:
        limit = f"the backward pass has at most {MAX_BACKWARD_HEAD_DIM}"
        raise ValueError(f"head_dim={head_dim} with head_dim_v={head_dim_v} is not supported; {limit}")
    tile, tile_v = (next(t for t in BACKWARD_HEAD_DIM_TILES if x <= t) for x in (head_dim, head_dim_v))
    return tile, tile_v


def backward_tile(
    head_dim: int, head_dim_v: int, score: Score, accumulation: Accumulation = Accumulation.UNORDERED
) -> BackwardTile:
    """The tile for the caller's head dims. Raises ValueError where there is none."""
    tiles = backward_head_dim_tiles(head_dim, head_dim_v)
    if max(tiles) == 64 and score is Score.SCALED:
        return BackwardTile(WarpgroupSplit.KEYS, DqPath.STAGED, block_m=128, block_n=128)
    if sum(tiles) <= max_columns_by_keys(score):
        # Where the accumulators leave the fewest registers, those of a turn are two too many for the staged path.
        crowded = sum(tiles) > 256 and accumulation is Accumulation.ORDERED
        dq_path = DqPath.DIRECT if crowded else DqPath.STAGED
        return BackwardTile(WarpgroupSplit.KEYS, dq_path, block_m=64, block_n=128)
    if tiles[0] % 128 == 0:
        return BackwardTile(WarpgroupSplit.COLUMNS, DqPath.DIRECT, block_m=64, block_n=128, num_dout_stages=1)
    return BackwardTile(WarpgroupSplit.COLUMNS, DqPath.DIRECT, block_m=64, block_n=64)


def _checked_tiles(problem: ForwardProblem, name: str, rows: int, what: str) -> int:
    """Blocks of ``rows`` rows over all query heads and sequences. Raises ValueError for more than a grid holds."""
    seqlen = getattr(problem, name)
    num_tiles = -(-seqlen // rows) * problem.batch * problem.heads_q
    if num_tiles > MAX_TILES:
        raise ValueError(
            f"the problem has {num_tiles} tiles of {rows} {what} (batch={problem.batch}, "
            f"heads_q={problem.heads_q}, {name}={seqlen}); at most {MAX_TILES} are supported"
        )
    return num_tiles


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
