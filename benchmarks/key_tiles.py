"""A model of the backward pass's main kernel: what the order of its tiles costs in memory traffic and in waiting.

Each multiprocessor (or cluster of them) takes the next tile when it is free. A tile takes a step for each block of
queries that sees its keys, and as much for its two ends as `TILE_ENDS` steps. In a step it reads the block's q and dout
and adds to its dq, by way of an L2 cache that forgets what was longest unused.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from benchmarks import model_problems
from benchmarks.model_problems import model_problem, sections
from flash_attn_3.backward_config import FP32_BYTES, Accumulation, DqPath
from flash_attn_3.backward_plan import BackwardPlan, BackwardProblem, plan_backward
from flash_attn_3.block_range import query_block_range
from flash_attn_3.problem import HOPPER_SMS, MaskSpec

#: An assumption, in steps: what a tile takes before its first step and after its last one.
TILE_ENDS = 3.0
#: An assumption, in steps: after a tile has added to a block, until others that wait for it may.
TURN = 0.7
#: An assumption, of the 50 MB: what is read by all multiprocessors takes its place twice.
CACHE_BYTES = 30 * 2**20
#: Assumptions: what a step's products take on an H200 at 85 % of the tensor cores' peak; what its memory moves at best.
STEP_MICROSECONDS = 2560 / 1.7e3 / 0.85
MEMORY_BYTES_PER_MICROSECOND = 4.2e6

#: (block of keys, head) in the order in which tiles are handed out.
Tiles = Iterable[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A problem of the models' size, and the planner's answer."""

    head_dim: int
    seqlen: int
    mask: MaskSpec
    accumulation: Accumulation = Accumulation.UNORDERED

    @property
    def num_heads(self) -> int:
        return model_problems.num_heads(self.head_dim, self.seqlen)

    @property
    def plan(self) -> BackwardPlan:
        forward = model_problem(self.head_dim, self.seqlen, self.mask)
        return plan_backward(BackwardProblem(forward, self.accumulation))

    @property
    def num_key_blocks(self) -> int:
        return -(-self.seqlen // self.plan.config.block_n)

    def all_heads_together(self) -> Tiles:
        """The first tiles of all heads, then the second ones, and so on."""
        return self.in_sections(self.num_heads, 0)

    def in_planned_sections(self) -> Tiles:
        return self.in_sections(self.plan.heads_per_section, self.plan.least_heads_in_last_section)

    def in_sections(self, heads: int, least_last: int) -> Iterator[tuple[int, int]]:
        for section in sections(self.num_heads, heads, least_last):
            for n_block in range(self.num_key_blocks):
                yield from ((n_block, head) for head in section)


@dataclasses.dataclass(frozen=True)
class Step:
    """A tile begins to work on a block of queries of a head."""

    time: float
    head: int
    m_block: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a launch, in steps; `bytes_moved` between memory and the cache."""

    time: float
    bytes_moved: int

    @property
    def microseconds(self) -> float:
        """By what takes longer, the products or the memory."""
        return max(self.time * STEP_MICROSECONDS, self.bytes_moved / MEMORY_BYTES_PER_MICROSECOND)


def simulate(launch: Launch, tiles: Tiles, turn: float = TURN) -> Outcome:
    """Time and traffic of a launch whose tiles are handed out in this order."""
    time, steps = run_tiles(launch, tiles, turn)
    config = launch.plan.config
    row_bytes = launch.head_dim * config.dtype.num_bytes
    # q and dout are read; dq is read, and written when it leaves the cache. k, v, dk and dv pass once.
    dq_bytes = config.block_m * launch.head_dim * FP32_BYTES
    block_bytes = config.block_m * 2 * row_bytes + 2 * dq_bytes
    misses = count_misses(steps, CACHE_BYTES // (block_bytes - dq_bytes))
    # A block to which the first addition is a store need not be read before.
    stored = len({(step.head, step.m_block) for step in steps}) if config.dq_path is DqPath.STAGED else 0
    key_bytes = launch.num_heads * launch.seqlen * 4 * row_bytes
    return Outcome(time, misses * block_bytes - stored * dq_bytes + key_bytes)


def run_tiles(launch: Launch, tiles: Tiles, turn: float) -> tuple[float, list[Step]]:
    """(when the last tile ends, all steps). A tile waits only for tiles that were handed out before it.

    Without an order of additions it waits for the first one, if that is a store.
    """
    config = launch.plan.config
    ordered = launch.accumulation is Accumulation.ORDERED
    free_at = [0.0] * (HOPPER_SMS // config.cluster_size)
    next_turn: dict[tuple[int, int], float] = {}
    steps = []
    for n_block, head in tiles:
        time = free_at[0] + TILE_ENDS / 2
        blocks = query_block_range(launch.mask, n_block, config.block_m, config.block_n, launch.seqlen, launch.seqlen)
        for m_block in reversed(range(blocks.begin, blocks.end)):
            steps.append(Step(time, head, m_block))
            time += 1.0
            if not config.takes_turns:
                continue
            block = head, m_block
            time = max(time, next_turn.get(block, 0.0))
            if ordered or block not in next_turn:
                next_turn[block] = time + turn
        heapq.heapreplace(free_at, time + TILE_ENDS / 2)
    return max(free_at), steps


def count_misses(steps: list[Step], cached_blocks: int) -> int:
    """Steps whose block is not among the `cached_blocks` that were used last."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for step in sorted(steps, key=lambda step: step.time):
        block = step.head, step.m_block
        if block in cache:
            cache.move_to_end(block)
            continue
        misses += 1
        cache[block] = None
        if len(cache) > cached_blocks:
            cache.popitem(last=False)
    return misses
