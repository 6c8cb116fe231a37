"""The planner: problem -> kernel configuration and launch shape. Pure Python, no tensors, no CUDA."""

from __future__ import annotations

import dataclasses
import functools

from .config import (
    ForwardConfig,
    Mask,
    OutputBuffer,
    Rescale,
    Schedule,
    Score,
    SeqLayout,
)
from .problem import ForwardProblem

#: Tile widths kernels exist for; a head dim runs in the smallest that holds it.
HEAD_DIM_TILES = (64, 96, 128, 192, 256)
#: Widest value tile; wider values (up to 512) run as several column passes.
MAX_VALUE_TILE = 256
#: Tiles of one launch; the kernels number them in 32 bits and count a few beyond the last.
MAX_TILES = 2**31 - 2**16
#: Keys and values of the heads worked on together should stay in the L2 cache. It has 50 MB, in two halves that each
#: hold what their own multiprocessors read; smaller sections let more CTAs read the same keys at the same time.
L2_KV_BYTES = 8 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """The tunable part of a `ForwardConfig`."""

    block_m: int
    block_n: int
    num_stages: int = 2
    schedule: Schedule = Schedule.PING_PONG
    rescale: Rescale = Rescale.EAGER
    output_buffer: OutputBuffer = OutputBuffer.OWN


_WIDE = ForwardTile(192, 128)
_SQUARE = ForwardTile(128, 128)


def _big(block_n: int, output_buffer: OutputBuffer = OutputBuffer.WITH_Q) -> ForwardTile:
    """Tiles with a wide output: products outweigh the softmax, so no turns; correcting the output costs the most."""
    return ForwardTile(
        128, block_n, schedule=Schedule.INTRA_WARPGROUP, rescale=Rescale.LAZY, output_buffer=output_buffer
    )


#: (head_dim tile, head_dim_v tile) -> mask -> tile.
_FORWARD_TILES: dict[tuple[int, int], dict[Mask, ForwardTile]] = {
    (64, 64): {Mask.FULL: _WIDE, Mask.CAUSAL: _WIDE, Mask.LOCAL: _SQUARE},
    (64, 128): dict.fromkeys(Mask, _SQUARE),
    (64, 256): dict.fromkeys(Mask, _big(80, OutputBuffer.OWN)),
    (96, 96): dict.fromkeys(Mask, _SQUARE),
    (128, 128): dict.fromkeys(Mask, _SQUARE),
    (192, 128): dict.fromkeys(Mask, _big(128)),
    (192, 192): {Mask.FULL: _big(112), Mask.CAUSAL: _big(96), Mask.LOCAL: _big(96)},
    (256, 256): {Mask.FULL: _big(80), Mask.CAUSAL: _big(80), Mask.LOCAL: _big(64)},
}
#: Softcap needs registers that these tiles' plain kernels do not leave.
_SOFTCAP_TILES: dict[tuple[int, int], ForwardTile] = {(64, 64): _SQUARE, (256, 256): _big(64)}


@dataclasses.dataclass(frozen=True)
class ForwardPlan:
    """The planner's answer: which kernel, and how to launch it.

    Attributes:
        config: the kernel.
        num_ctas: persistent CTAs to launch (0: there is nothing to compute).
        num_value_passes: column passes over values wider than the value tile.
        heads_per_section: how many (batch, head) pairs are worked on together, so that their keys and
            values stay in the L2 cache while the query blocks sweep over them.
    """

    config: ForwardConfig
    num_ctas: int
    num_value_passes: int
    heads_per_section: int


def head_dim_tiles(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The (q/k, v) tile widths that serve these head dims. Raises ValueError where no kernel does."""
    tile = next((t for t in HEAD_DIM_TILES if head_dim <= t), None)
    if tile is None:
        raise ValueError(f"head_dim={head_dim} is not supported; it must be at most {HEAD_DIM_TILES[-1]}")
    candidates = sorted(v for d, v in _FORWARD_TILES if d == tile)
    narrow = next((v for v in candidates if head_dim_v <= v), None)
    if narrow is not None:
        return tile, narrow
    if candidates[-1] == MAX_VALUE_TILE:
        return tile, MAX_VALUE_TILE
    raise ValueError(
        f"head_dim_v={head_dim_v} is not supported with head_dim={head_dim}; it must be at most {candidates[-1]}"
    )


def forward_config(problem: ForwardProblem) -> ForwardConfig:
    """The kernel for a problem."""
    head_dim, head_dim_v = head_dim_tiles(problem.head_dim, problem.head_dim_v)
    tile = _FORWARD_TILES[head_dim, head_dim_v][problem.mask.mask]
    if problem.score is Score.SOFTCAP:
        tile = _SOFTCAP_TILES.get((head_dim, head_dim_v), tile)
    config = ForwardConfig(
        dtype=problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=problem.mask.mask,
        seq_layout=problem.seq_layout,
        score=problem.score,
        **{field.name: getattr(tile, field.name) for field in dataclasses.fields(tile)},
    )
    config.validate()
    return config


@functools.lru_cache(maxsize=4096)
def plan_forward(problem: ForwardProblem) -> ForwardPlan:
    """Choose the kernel and the launch shape. The result depends on nothing but the problem."""
    config = forward_config(problem)
    num_value_passes = max(1, -(-problem.head_dim_v // config.head_dim_v))
    num_m_blocks = -(-problem.max_seqlen_q // config.block_m)
    num_tiles = num_m_blocks * problem.batch * problem.heads_q * num_value_passes
    if num_tiles > MAX_TILES:
        raise ValueError(
            f"the problem has {num_tiles} tiles of {config.block_m} query rows (batch={problem.batch}, "
            f"heads_q={problem.heads_q}, max_seqlen_q={problem.max_seqlen_q}); at most {MAX_TILES} are supported"
        )
    return ForwardPlan(
        config=config,
        num_ctas=min(problem.num_sms, num_tiles),
        num_value_passes=num_value_passes,
        heads_per_section=_heads_per_section(problem, num_value_passes),
    )


def _heads_per_section(problem: ForwardProblem, num_value_passes: int) -> int:
    """Query heads (times value passes) whose keys and values fit in the L2 budget together; whole kv groups."""
    kv_bytes = max(1, problem.max_seqlen_k) * (problem.head_dim + problem.head_dim_v) * problem.dtype.num_bytes
    kv_heads = max(1, L2_KV_BYTES // kv_bytes)
    per_kv_head = problem.heads_q // problem.heads_kv * num_value_passes
    limit = problem.heads_q * num_value_passes
    if problem.seq_layout is SeqLayout.DENSE:
        limit *= max(1, problem.batch)
    return max(1, min(kv_heads * per_kv_head, limit))
