"""The planner: problem -> kernel configuration and launch shape. Pure Python, no tensors, no CUDA."""

from __future__ import annotations

import dataclasses
import functools

from .block_range import block_range
from .config import HEAD_DIM_TILES, PROMOTION_KEYS, WARPGROUP_ROWS, ForwardConfig, Mask, SeqLayout
from .problem import ForwardProblem, Packing
from .sections import heads_that_end_evenly
from .tile_table import HEAD_DIM_PAIRS, ForwardTile, TileChoice, TileKey, forward_tiles

#: Widest value tile; wider values (up to 512) run as several column passes.
MAX_VALUE_TILE = 256
#: Tiles of one launch; the kernels number them in 32 bits and count a few beyond the last.
MAX_TILES = 2**31 - 2**16
#: Heads are packed where their tiles are filled less than this share of what packed ones are.
LEAST_FILLED_UNPACKED = 0.9
#: Multiprocessors work in clusters where such a share of them has query rows to work on; sharing keys gains little more
#: than the rest loses.
LEAST_USED_IN_CLUSTERS = 0.97


@dataclasses.dataclass(frozen=True)
class ForwardPlan:
    """The planner's answer: which kernel, and how to launch it.

    Attributes:
        config: the kernel.
        num_ctas: persistent CTAs to launch (0: there is nothing to compute).
        packed_heads: query heads that lie in one tile together.
        num_value_passes: column passes over values wider than the value tile.
        heads_per_section: how many (batch, head) pairs are worked on together, so that their keys and
            values stay in the L2 cache while the query blocks sweep over them.
        least_heads_in_last_section: so many, or all, are worked on together at the end of the launch, so that it
            ends with short tiles.
        promoted_floats: fp32 elements of scratch that the launch needs; 0 but for very long sequences.
    """

    config: ForwardConfig
    num_ctas: int
    packed_heads: int
    num_value_passes: int
    heads_per_section: int
    least_heads_in_last_section: int
    promoted_floats: int


def head_dim_tiles(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The (q/k, v) tile widths that serve these head dims. Raises ValueError where no kernel does."""
    tile = next((t for t in HEAD_DIM_TILES if head_dim <= t), None)
    if tile is None:
        raise ValueError(f"head_dim={head_dim} is not supported; it must be at most {HEAD_DIM_TILES[-1]}")
    candidates = sorted(v for d, v in HEAD_DIM_PAIRS if d == tile)
    narrow = next((v for v in candidates if head_dim_v <= v), None)
    if narrow is not None:
        return tile, narrow
    if candidates[-1] == MAX_VALUE_TILE:
        return tile, MAX_VALUE_TILE
    raise ValueError(
        f"head_dim_v={head_dim_v} is not supported with head_dim={head_dim}; it must be at most {candidates[-1]}"
    )


def tile_key(problem: ForwardProblem) -> TileKey:
    """Where a problem stands in the table. Raises ValueError where no kernel has its head dims."""
    return TileKey(*head_dim_tiles(problem.head_dim, problem.head_dim_v), problem.mask.mask, problem.score)


def forward_config(problem: ForwardProblem) -> ForwardConfig:
    """The kernel for a problem."""
    return _config(problem, _choice(problem).tile)


def forward_configs(problem: ForwardProblem) -> list[ForwardConfig]:
    """The kernels for problems that differ from this one in the number and length of the query sequences alone."""
    tiles = [choice.tile for choice in forward_tiles().choices[tile_key(problem)]]
    if problem.seq_layout is SeqLayout.VARLEN:
        tiles = [tile.of_one_cta() for tile in tiles]
    variants = [*tiles, *(tile.of_one_cta() for tile in tiles), *(tile.of_one_warpgroup() for tile in tiles)]
    return [_config(problem, tile) for tile in dict.fromkeys(variants)]


def _choice(problem: ForwardProblem) -> TileChoice:
    """The table's choice, or what suits the number and length of the query sequences better. Rows' results are the
    same."""
    choice = forward_tiles().choice(tile_key(problem), problem.max_seqlen_q)
    tile = choice.tile
    if _one_warpgroup_suits(problem, tile):
        tile = tile.of_one_warpgroup()
    elif not _clusters_suit(problem, tile):
        tile = tile.of_one_cta()
    return dataclasses.replace(choice, tile=tile)


def _one_warpgroup_suits(problem: ForwardProblem, tile: ForwardTile) -> bool:
    """Where all of its tiles find a multiprocessor, more of those work, on less each; and where there are no more of
    them than of the table's tiles, these have rows for one of their warpgroups only."""
    high, low = (_tiles(problem, _config(problem, tile)).count for tile in (tile, tile.of_one_warpgroup()))
    return 0 < low <= max(problem.num_sms, high)


def _clusters_suit(problem: ForwardProblem, tile: ForwardTile) -> bool:
    """Not where lengths differ: tiles are dealt out to clusters in turn, whichever is free. Nor where many CTAs have no
    rows, or many multiprocessors no CTA: in a cluster that goes past the last query block, or beside the last one."""
    size = tile.cluster_size
    if problem.seq_layout is SeqLayout.VARLEN or problem.num_sms < size:
        return False
    m_blocks = max(1, _tiles(problem, _config(problem, tile)).m_blocks)
    with_rows = m_blocks / (-(-m_blocks // size) * size)
    with_ctas = problem.num_sms // size * size / problem.num_sms
    return with_rows * with_ctas >= LEAST_USED_IN_CLUSTERS


def _config(problem: ForwardProblem, tile: ForwardTile) -> ForwardConfig:
    config = tile_key(problem).config(tile, problem.dtype, problem.seq_layout)
    config.validate()
    return config


@functools.lru_cache(maxsize=4096)
def plan_forward(problem: ForwardProblem) -> ForwardPlan:
    """Choose the kernel and the launch shape. The result depends on nothing but the problem."""
    return plan_choice(problem, _choice(problem))


def plan_choice(problem: ForwardProblem, choice: TileChoice) -> ForwardPlan:
    """The launch shape for a given choice; the tuner compares the choices that the table could hold."""
    config = _config(problem, choice.tile)
    tiles = _tiles(problem, config)
    if tiles.count > MAX_TILES:
        raise ValueError(
            f"the problem has {tiles.count} tiles of {config.block_m} query rows (batch={problem.batch}, "
            f"heads_q={problem.heads_q}, max_seqlen_q={problem.max_seqlen_q}); at most {MAX_TILES} are supported"
        )
    # Each cluster works on as many query blocks as it has CTAs, the last of which may not exist.
    size = config.cluster_size
    num_ctas = min(max(1, problem.num_sms // size), -(-tiles.m_blocks // size) * problem.batch * tiles.heads) * size
    return ForwardPlan(
        config=config,
        num_ctas=num_ctas,
        packed_heads=tiles.packed_heads,
        num_value_passes=tiles.value_passes,
        heads_per_section=_heads_per_section(problem, tiles.heads, choice.l2_kv_bytes),
        least_heads_in_last_section=_least_heads_in_last_section(problem, tiles.m_blocks),
        promoted_floats=num_ctas * config.promoted_floats if problem.max_seqlen_k > PROMOTION_KEYS else 0,
    )


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What a problem is cut into: `m_blocks` query blocks for each of `heads` (group of packed heads, value pass)
    pairs of each sequence."""

    packed_heads: int
    value_passes: int
    m_blocks: int
    heads: int
    count: int


def _tiles(problem: ForwardProblem, config: ForwardConfig) -> _Tiles:
    packed_heads = _packed_heads(problem, config.block_m)
    value_passes = max(1, -(-problem.head_dim_v // config.head_dim_v))
    m_blocks = -(-problem.max_seqlen_q // _positions(config.block_m, packed_heads))
    heads = problem.heads_q // packed_heads * value_passes
    return _Tiles(packed_heads, value_passes, m_blocks, heads, m_blocks * problem.batch * heads)


def _positions(block_m: int, packed_heads: int) -> int:
    """Query positions of a tile: whole ones in each warpgroup."""
    return block_m // WARPGROUP_ROWS * (WARPGROUP_ROWS // packed_heads)


def _packed_heads(problem: ForwardProblem, block_m: int) -> int:
    """The query heads, a divisor of those that share a key head, that lie in one tile together.

    More fill the tiles of short sequences better; where they do not, fewer leave more tiles to balance. Where lengths
    are known to the device alone, sequences may be short, whatever the longest one is.
    """
    group = problem.heads_q // max(1, problem.heads_kv)
    if group == 0 or problem.packing is Packing.NEVER:
        return 1
    possible = [heads for heads in range(1, WARPGROUP_ROWS + 1) if group % heads == 0]
    if problem.packing is Packing.ALWAYS or problem.seq_layout is SeqLayout.VARLEN:
        return possible[-1]

    def filled(heads: int) -> float:
        m_blocks = -(-problem.max_seqlen_q // _positions(block_m, heads))
        return problem.max_seqlen_q * heads / (m_blocks * block_m) if m_blocks > 0 else 1.0

    best = max(possible, key=filled)
    return best if filled(1) < LEAST_FILLED_UNPACKED * filled(best) else 1


def _heads_per_section(problem: ForwardProblem, num_heads: int, l2_kv_bytes: int) -> int:
    """How many of a sequence's `num_heads` (group of packed heads, value pass) pairs have keys and values that fit in
    the L2 budget together; whole kv groups."""
    kv_bytes = max(1, problem.max_seqlen_k) * (problem.head_dim + problem.head_dim_v) * problem.dtype.num_bytes
    kv_heads = max(1, l2_kv_bytes // kv_bytes)
    per_kv_head = num_heads // problem.heads_kv
    limit = num_heads
    if problem.seq_layout is SeqLayout.DENSE:
        limit *= max(1, problem.batch)
    return max(1, min(kv_heads * per_kv_head, limit))


def _least_heads_in_last_section(problem: ForwardProblem, num_m_blocks: int) -> int:
    """So many, or all, are worked on together at the end. A tile takes as long as it sees keys."""
    if problem.mask.mask is Mask.FULL or num_m_blocks == 0 or problem.max_seqlen_k == 0:
        return 1
    rows = -(-problem.max_seqlen_q // num_m_blocks)  # positions of a tile

    def keys(m_block: int) -> int:
        tile = block_range(problem.mask, m_block, rows, 1, problem.max_seqlen_q, problem.max_seqlen_k)
        return tile.end - tile.begin

    return heads_that_end_evenly(keys, -(-problem.max_seqlen_q // rows), problem.num_sms)
