"""The models behind the planner's choices: that they tell cases apart, and what they say of the choices made."""

import ctypes
import dataclasses
import itertools
from pathlib import Path

import pytest
from benchmarks import key_tiles, limits, model_problems, models, varlen_order
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import Problem, Side

import host_headers
from flash_attn_3.backward_config import Accumulation, DqPath
from flash_attn_3.config import PROMOTION_KEYS, Mask, SeqLayout
from flash_attn_3.heuristics import MAX_VALUE_TILE
from flash_attn_3.problem import UNLIMITED, MaskSpec

REPOSITORY = Path(__file__).resolve().parents[2]
#: bfloat16 rounds to this, relatively.
BF16_ROUNDING = 2.0**-9


class TilePosition(ctypes.Structure):
    _fields_ = (("m_block", ctypes.c_int32), ("head", ctypes.c_int32))


def scale_in_one_level(num_keys: int) -> float:
    return models.accumulate(num_keys, 2 * num_keys)[0]


def test_one_level_shrinks_by_less_than_the_rounding_of_the_output():
    """Why very long outputs are accumulated in levels of PROMOTION_KEYS keys."""
    assert 0.0 < 1.0 - scale_in_one_level(PROMOTION_KEYS) <= BF16_ROUNDING / 4


@pytest.mark.parametrize("num_keys", [PROMOTION_KEYS // 8, PROMOTION_KEYS // 2])
def test_shrinkage_grows_with_the_length(num_keys):
    """So that a level must end somewhere."""
    assert 1.0 - scale_in_one_level(num_keys) < 1.0 - scale_in_one_level(2 * num_keys)


def test_two_levels_shrink_less():
    assert scale_in_one_level(2**16) < models.accumulate(2**16, 2**14)[0] < 1.0


@pytest.mark.parametrize("mask", [MaskSpec(Mask.FULL), MaskSpec(Mask.CAUSAL, UNLIMITED, 0)], ids=str)
def test_pairs_computed_are_those_of_the_visited_blocks(mask):
    """By brute force over blocks, for a tile of three warpgroups and a last one without a row."""
    seqlen, block_n = 320, 48
    visible = [[mask.mask is Mask.FULL or key <= row for key in range(seqlen)] for row in range(seqlen)]
    config = dataclasses.replace(models.planned(64, 512).config, block_m=192, block_n=block_n)
    for rows, halves in ((64, False), (192, False), (64, True)):
        computed = 0
        for begin in range(0, 384, rows):
            keys = {key for row in visible[begin : begin + rows] for key in range(seqlen) if row[key]}
            num_keys = max(1, len({key // block_n for key in keys})) * block_n
            if halves and num_keys > block_n and max(keys) % block_n < config.half_keys:
                num_keys -= block_n - config.half_keys
            computed += num_keys * rows
        assert models.pairs_computed(config, seqlen, mask, rows, halves) == computed / sum(map(sum, visible))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [1024, 8192])
def test_windows_end_no_less_evenly_in_sections(head_dim, window):
    """Wide ones much more: there the last tiles of a head are the longest."""
    mask = MaskSpec(Mask.LOCAL, window, 0)
    plan, tiles = models.planned(head_dim, 16384, mask), models.num_tiles(head_dim, 16384, mask)
    order = models.in_sections(*tiles, plan.heads_per_section, plan.least_heads_in_last_section)
    found = models.occupancy(head_dim, 16384, order, mask)
    assert found >= models.occupancy(head_dim, 16384, models.head_by_head(*tiles), mask) - 1e-9
    assert found >= 0.97 or window == 1024


@pytest.mark.parametrize("mask", [MaskSpec(Mask.FULL), model_problems.CAUSAL], ids=lambda mask: mask.mask.slug)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_key_tiles_find_their_queries_in_the_cache(head_dim, mask):
    """Little moves but what must, once: keys, q, dout and dq, which is cleared before where it is added directly.

    Under a causal mask more may, since the last queries come first; the products hide it.
    """
    launch = key_tiles.Launch(head_dim, 1024, mask)
    together = key_tiles.simulate(launch, launch.all_heads_together())
    planned = key_tiles.simulate(launch, launch.in_planned_sections())
    assert sorted(launch.in_planned_sections()) == sorted(launch.all_heads_together())
    dq_bytes = 4 if launch.plan.config.dq_path is DqPath.STAGED else 2 * 4
    once = model_problems.TOKENS * model_problems.FEATURES * (2 * 2 + dq_bytes + 4 * 2)
    assert once <= planned.bytes_moved < 1.3 * once < 2 * once < together.bytes_moved
    if mask.mask is Mask.FULL:
        assert planned.bytes_moved < 1.1 * once
    moving = planned.bytes_moved / key_tiles.MEMORY_BYTES_PER_MICROSECOND
    assert moving < 0.6 * planned.time * key_tiles.STEP_MICROSECONDS
    assert planned.time < 1.02 * together.time


@pytest.mark.parametrize("mask", [MaskSpec(Mask.FULL), model_problems.CAUSAL], ids=lambda mask: mask.mask.slug)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_few_wait_for_their_turn(head_dim, mask):
    unordered = key_tiles.Launch(head_dim, 2048, mask)
    ordered = dataclasses.replace(unordered, accumulation=Accumulation.ORDERED)
    time = key_tiles.simulate(unordered, unordered.in_planned_sections()).time
    assert key_tiles.simulate(ordered, ordered.in_planned_sections()).time < 1.05 * time
    one_head_after_the_other = key_tiles.simulate(ordered, ordered.in_sections(1, 0))
    assert one_head_after_the_other.time > 1.05 * time


def test_a_tile_waits_for_the_one_before():
    """By hand: a head of two blocks of keys and one of queries, of which the second adds after the first's turn."""
    launch = key_tiles.Launch(128, 64, MaskSpec(Mask.FULL), Accumulation.ORDERED)
    time, steps = key_tiles.run_tiles(launch, [(0, 0), (0, 0)], turn=5.0)
    assert [(step.time, step.m_block) for step in steps] == [(1.5, 0), (1.5, 0)]
    assert time == 1.5 + 1.0 + 5.0 + 1.5
    assert [key_tiles.count_misses(steps, blocks) for blocks in (1, 2)] == [1, 1]


def test_without_an_order_tiles_wait_for_the_first_one_only():
    """By hand: the same with three, of which two wait for the first one's store."""
    launch = key_tiles.Launch(128, 64, MaskSpec(Mask.FULL))
    time, _ = key_tiles.run_tiles(launch, [(0, 0)] * 3, turn=5.0)
    assert time == 1.5 + 1.0 + 5.0 + 1.5
    ordered = dataclasses.replace(launch, accumulation=Accumulation.ORDERED)
    assert key_tiles.run_tiles(ordered, [(0, 0)] * 3, turn=5.0)[0] == time + 5.0


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 70))
def test_sections_share_out_all_heads(num_heads, heads, least_last):
    found = model_problems.sections(num_heads, heads, least_last)
    assert list(itertools.chain(*found)) == list(range(num_heads))
    assert all(len(section) == heads for section in found[:-1])
    assert len(found[-1]) >= min(num_heads, max(1, least_last))


def test_a_larger_last_section_ends_a_launch_more_evenly():
    plan, tiles = models.planned(256, 8192), models.num_tiles(256, 8192)
    smaller = models.occupancy(256, 8192, models.in_sections(*tiles, plan.heads_per_section, 0))
    chosen = (plan.heads_per_section, plan.least_heads_in_last_section)
    assert smaller < models.occupancy(256, 8192, models.in_sections(*tiles, *chosen)) <= 1.0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
def test_causal_launches_keep_all_multiprocessors_busy(head_dim, seqlen):
    """The planner's sections in the order of the kernels' own header."""
    plan = models.planned(head_dim, seqlen)
    num_m_blocks, num_heads = models.num_tiles(head_dim, seqlen)
    position = TilePosition()

    def m_block(index: int) -> int:
        host_headers.build_scheduler().tile_position(
            *(list(Mask).index(Mask.CAUSAL), index, num_m_blocks, num_heads),
            *(plan.heads_per_section, plan.least_heads_in_last_section, ctypes.byref(position)),
        )
        return position.m_block

    assert models.occupancy(head_dim, seqlen, map(m_block, range(num_m_blocks * num_heads))) >= 0.96


def test_the_readme_has_the_limits_of_each_tile():
    lines = (REPOSITORY / "csrc" / "kernels" / "README.md").read_text().splitlines()
    rows = [limits.table_row(*tile, MAX_VALUE_TILE) for tile in limits.TILES]
    begin = lines.index(rows[0])
    assert lines[begin : begin + len(rows) + 1] == [*rows, ""]


@given(st.lists(st.tuples(st.integers(0, 300), st.one_of(st.integers(0, 3000), st.integers(0, 2**17))), max_size=150))
def test_sequences_are_handed_out_as_the_kernels_do(lengths):
    """By the model of the scheduler's tests, which is held against the kernels' header."""
    lens_q, lens_k = (tuple(length[i] for length in lengths) for i in (0, 1))
    q, k = (Side(max(lens, default=0), lens) for lens in (lens_q, lens_k))
    problem = Problem(Mask.FULL, SeqLayout.VARLEN, len(lengths), 1, 1, 1, 1, 0, q, k)
    handed = dict.fromkeys(batch for batch, _, _ in problem.tiles())
    modelled = [b for b, _ in varlen_order.by_classes(varlen_order.Batch("", lengths))]
    assert sorted(modelled) == list(range(len(lengths)))
    assert [b for b in modelled if b in handed] == list(handed)


def test_a_long_sequence_at_the_end_need_not_be_waited_for():
    lengths = [(128, 1000)] * 1000 + [(128, 2**17)]
    batch = varlen_order.Batch("", lengths)
    alone = varlen_order.microseconds(varlen_order.Batch("", lengths[-1:]), varlen_order.by_groups)
    others = varlen_order.microseconds(varlen_order.Batch("", lengths[:-1]), varlen_order.by_groups)
    assert varlen_order.microseconds(batch, varlen_order.by_groups) > 0.95 * (alone + others)
    assert varlen_order.microseconds(batch, varlen_order.by_classes) < 1.05 * max(alone, others)
