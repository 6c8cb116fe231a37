"""The planner of the backward pass: problem -> kernel configuration and launch shape, and the layout of its scratch.

Pure Python, no tensors, no CUDA.
"""

from __future__ import annotations

import dataclasses
import functools

from .backward_config import Accumulation, BackwardConfig
from .heuristics import MAX_TILES, head_dim_tiles
from .problem import ForwardProblem

#: Widest head dim, of q and k as of v, that can be differentiated.
MAX_BACKWARD_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """Query rows and keys of one step of the main loop."""

    block_m: int
    block_n: int


#: The wider one of the two head dim tiles -> the tile that serves it.
BACKWARD_TILES = {
    64: BackwardTile(block_m=128, block_n=128),
    96: BackwardTile(block_m=64, block_n=128),
    128: BackwardTile(block_m=64, block_n=128),
    192: BackwardTile(block_m=64, block_n=96),
    256: BackwardTile(block_m=64, block_n=80),
}


@dataclasses.dataclass(frozen=True)
class BackwardProblem:
    """One backward call, as far as the planner cares: the forward call that it belongs to, and how it may add up."""

    forward: ForwardProblem
    accumulation: Accumulation


@dataclasses.dataclass(frozen=True)
class BackwardPlan:
    """The planner's answer.

    Attributes:
        config: the kernel of the main loop.
        num_tiles: blocks of keys over all query heads and sequences (0: no key, or no query head).
    """

    config: BackwardConfig
    num_tiles: int


@functools.lru_cache(maxsize=4096)
def plan_backward(problem: BackwardProblem) -> BackwardPlan:
    """Choose the kernel and the launch shape. The result depends on nothing but the problem."""
    forward = problem.forward
    head_dim, head_dim_v = head_dim_tiles(forward.head_dim, forward.head_dim_v)
    tile = backward_tile(forward.head_dim, forward.head_dim_v)
    config = BackwardConfig(
        dtype=forward.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=forward.mask.mask,
        seq_layout=forward.seq_layout,
        score=forward.score,
        accumulation=problem.accumulation,
        block_m=tile.block_m,
        block_n=tile.block_n,
    )
    config.validate()
    num_n_blocks = -(-forward.max_seqlen_k // config.block_n)
    num_tiles = num_n_blocks * forward.batch * forward.heads_q
    if num_tiles > MAX_TILES:
        raise ValueError(
            f"the problem has {num_tiles} tiles of {config.block_n} keys (batch={forward.batch}, "
            f"heads_q={forward.heads_q}, max_seqlen_k={forward.max_seqlen_k}); at most {MAX_TILES} are supported"
        )
    return BackwardPlan(config, num_tiles)


def backward_tile(head_dim: int, head_dim_v: int) -> BackwardTile:
    """The tile for the caller's head dims. Raises ValueError where no kernel has them."""
    if max(head_dim, head_dim_v) > MAX_BACKWARD_HEAD_DIM:
        limit = f"the backward pass has at most {MAX_BACKWARD_HEAD_DIM}"
        raise ValueError(f"head_dim={head_dim} with head_dim_v={head_dim_v} is not supported; {limit}")
    return BACKWARD_TILES[max(head_dim_tiles(head_dim, head_dim_v))]


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
