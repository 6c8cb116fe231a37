"""The planner of the backward pass."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3 import presets
from flash_attn_3.backward_config import BACKWARD_HEAD_DIM_TILES, Accumulation, BackwardConfig, DqPath, WarpgroupSplit
from flash_attn_3.backward_plan import (
    L2_QUERY_BYTES,
    ORDERED_TILES_OF_A_HEAD,
    BackwardProblem,
    BackwardTile,
    backward_tile,
    plan_backward,
)
from flash_attn_3.config import MAX_SMEM_BYTES, ConfigError, Dtype, Mask, Score, SeqLayout
from flash_attn_3.problem import ForwardProblem, MaskSpec

KEYS, COLUMNS = WarpgroupSplit.KEYS, WarpgroupSplit.COLUMNS

FORWARD = ForwardProblem(
    dtype=Dtype.BF16,
    batch=3,
    max_seqlen_q=100,
    max_seqlen_k=1000,
    heads_q=8,
    heads_kv=2,
    head_dim=128,
    head_dim_v=128,
    mask=MaskSpec(Mask.CAUSAL, window_right=0),
    score=Score.SCALED,
    seq_layout=SeqLayout.DENSE,
    num_sms=132,
)
PROBLEM = BackwardProblem(FORWARD, Accumulation.UNORDERED)


def problem(**changes) -> BackwardProblem:
    return BackwardProblem(dataclasses.replace(FORWARD, **changes), Accumulation.UNORDERED)


def test_plan_of_a_problem():
    plan = plan_backward(PROBLEM)
    assert plan.config == BackwardConfig(
        dtype=Dtype.BF16,
        head_dim=128,
        head_dim_v=128,
        mask=Mask.CAUSAL,
        seq_layout=SeqLayout.DENSE,
        score=Score.SCALED,
        accumulation=Accumulation.UNORDERED,
        split=WarpgroupSplit.KEYS,
        dq_path=DqPath.STAGED,
        block_m=64,
        block_n=128,
    )
    assert plan.config.name == "bwd_bf16_d128_causal_dense_scaled_unordered_keys_staged_m64n128s2d2"


@pytest.mark.parametrize(
    ("head_dims", "tiles", "tile"),
    [
        ((8, 8), (64, 64), BackwardTile(KEYS, DqPath.STAGED, 128, 128)),
        ((64, 96), (64, 128), BackwardTile(KEYS, DqPath.STAGED, 64, 128)),
        ((128, 64), (128, 64), BackwardTile(KEYS, DqPath.STAGED, 64, 128)),
        ((72, 72), (128, 128), BackwardTile(KEYS, DqPath.STAGED, 64, 128)),
        ((40, 256), (64, 256), BackwardTile(KEYS, DqPath.STAGED, 64, 128)),
        ((192, 128), (192, 128), BackwardTile(KEYS, DqPath.STAGED, 64, 128)),
        ((136, 136), (192, 192), BackwardTile(COLUMNS, DqPath.DIRECT, 64, 64)),
        ((256, 256), (256, 256), BackwardTile(COLUMNS, DqPath.DIRECT, 64, 128, num_dout_stages=1)),
    ],
)
def test_each_head_dim_runs_in_a_tile_of_its_own(head_dims, tiles, tile):
    """The columns of both together decide on the blocks."""
    config = plan_backward(problem(head_dim=head_dims[0], head_dim_v=head_dims[1])).config
    assert (config.head_dim, config.head_dim_v) == tiles
    assert BackwardTile(config.split, config.dq_path, config.block_m, config.block_n, config.num_dout_stages) == tile
    assert backward_tile(*head_dims, Score.SCALED) == tile


def test_two_ctas_share_the_keys_of_the_widest_tiles():
    config = plan_backward(problem(head_dim=256, head_dim_v=256)).config
    assert (config.cluster_size, config.tile_keys, config.num_dq_parts, config.dq_columns) == (2, 64, 4, 64)
    config = plan_backward(problem(head_dim=192, head_dim_v=192)).config
    assert (config.cluster_size, config.tile_keys, config.num_dq_parts, config.dq_columns) == (1, 64, 2, 96)


def test_dq_is_made_in_slices_where_registers_are_scarce():
    config = plan_backward(problem(head_dim=192, head_dim_v=128)).config
    assert (config.dq_columns, config.dq_slice_columns, config.dq_rest_columns) == (96, 64, 32)


def test_a_softcap_has_narrower_blocks():
    config = plan_backward(problem(head_dim=64, head_dim_v=64, score=Score.SOFTCAP)).config
    assert (config.block_m, config.block_n) == (64, 128)
    assert config == dataclasses.replace(config, block_m=backward_tile(64, 64, Score.SOFTCAP).block_m)


def test_a_softcap_leaves_room_for_fewer_columns():
    """Its slopes take registers, so that columns are split where keys are without it."""
    assert backward_tile(192, 128, Score.SCALED).split is KEYS
    assert backward_tile(192, 128, Score.SOFTCAP).split is COLUMNS
    config = plan_backward(problem(head_dim=192, head_dim_v=128)).config
    with pytest.raises(ConfigError, match=r"split=.*KEYS.* is not supported; it must be COLUMNS"):
        dataclasses.replace(config, score=Score.SOFTCAP).validate()


def test_values_too_wide():
    with pytest.raises(ValueError, match="head_dim_v=512 is not supported"):
        backward_tile(64, 512, Score.SCALED)


def test_scratch_for_dq():
    """One float for each column of the tile; where additions take turns one for each warpgroup's part of a block."""
    plan = plan_backward(problem(head_dim=72))
    assert plan.dq_scratch_floats(640) == 640 * 128 + 10 * 2
    ordered = plan_backward(dataclasses.replace(PROBLEM, accumulation=Accumulation.ORDERED))
    assert ordered.dq_scratch_floats(640) == 640 * 128 + 10 * 2
    wide = dataclasses.replace(FORWARD, head_dim=256, head_dim_v=256)
    assert plan_backward(BackwardProblem(wide, Accumulation.UNORDERED)).dq_scratch_floats(640) == 640 * 256
    assert plan_backward(BackwardProblem(wide, Accumulation.ORDERED)).dq_scratch_floats(640) == 640 * 256 + 10 * 4


@pytest.mark.parametrize(
    ("changes", "num_ctas"),
    [
        ({}, 132),
        ({"num_sms": 100}, 100),  # by an `sm_margin`
        ({"batch": 1, "heads_q": 3, "heads_kv": 3, "max_seqlen_k": 129}, 6),
        ({"batch": 1, "heads_q": 3, "heads_kv": 3, "max_seqlen_k": 129, "head_dim": 256, "head_dim_v": 256}, 12),
        ({"head_dim": 256, "head_dim_v": 256, "num_sms": 101}, 100),  # clusters of two are whole
        ({"max_seqlen_k": 0}, 1),
    ],
    ids=str,
)
def test_one_cta_on_each_multiprocessor(changes, num_ctas):
    """As far as there are blocks of keys."""
    assert plan_backward(problem(**{"batch": 16, "heads_kv": 16, "heads_q": 16, **changes})).num_ctas == num_ctas


@pytest.mark.parametrize("mask", [MaskSpec(Mask.CAUSAL, window_right=0), MaskSpec(Mask.FULL)], ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen", "heads_q", "heads_kv", "parts"),
    [
        (1, 8192, 8, 1, 8),
        (1, 2048, 32, 8, 4),
        (1, 2048, 28, 4, 7),
        (8, 8192, 32, 8, 1),  # tiles enough
        (1, 128, 16, 16, 1),  # nothing to part
        (1, 0, 8, 1, 1),
    ],
)
def test_heads_that_share_few_keys_are_parted(mask, batch, seqlen, heads_q, heads_kv, parts):
    lengths = {"max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
    plan = plan_backward(problem(mask=mask, batch=batch, heads_q=heads_q, heads_kv=heads_kv, **lengths))
    assert plan.group_parts == parts
    assert plan.key_part_floats(10) == (10 * parts * 128 * (128 + 128) if parts > 1 else 0)


@given(
    batch=st.integers(1, 4),
    seqlen=st.integers(1, 5000),
    heads_kv=st.integers(1, 8),
    group=st.integers(1, 72),
    num_sms=st.integers(1, 132),
)
def test_parts_of_a_group_are_whole_heads_and_worth_it(batch, seqlen, heads_kv, group, num_sms):
    sizes = {"batch": batch, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen, "num_sms": num_sms}
    plan = plan_backward(problem(**sizes, heads_kv=heads_kv, heads_q=heads_kv * group))
    tiles = -(-seqlen // 128) * batch * heads_kv
    assert group % plan.group_parts == 0
    assert plan.group_parts == 1 or tiles < 8 * num_sms
    assert plan.group_parts == group or tiles * plan.group_parts >= min(num_sms, tiles * group) / 2


def test_no_two_ctas_fit_on_a_multiprocessor():
    """So that no more CTAs than multiprocessors can run."""
    configs = [config for config in presets.all_configs() if isinstance(config, BackwardConfig)]
    assert min(config.smem_bytes for config in configs) > MAX_SMEM_BYTES // 2


def equal_lengths(head_dim: int, seqlen: int, **changes) -> BackwardProblem:
    """16384 tokens of 2048 features."""
    heads = 2048 // head_dim
    sizes = {"batch": 16384 // seqlen, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen, "heads_q": heads}
    return problem(**{**sizes, "heads_kv": heads, "head_dim": head_dim, "head_dim_v": head_dim, **changes})


@pytest.mark.parametrize("seqlen", [512, 2048, 16384])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_queries_of_a_section_stay_in_the_cache(head_dim, seqlen):
    """A row has 8 bytes for each column: q, dout, and dq in fp32. Of one head they may be more."""
    plan = plan_backward(equal_lengths(head_dim, seqlen))
    head_bytes = 8 * head_dim * seqlen
    assert plan.heads_per_section == max(1, L2_QUERY_BYTES // head_bytes)
    assert plan_backward(equal_lengths(head_dim, seqlen, batch=1, heads_q=1, heads_kv=1)).heads_per_section == 1


def test_heads_of_a_group_count_once():
    """They take turns in a tile."""
    plan = plan_backward(equal_lengths(128, 2048, heads_kv=2))
    assert plan.heads_per_section == L2_QUERY_BYTES // (8 * 128 * 2048)


@pytest.mark.parametrize(("head_dim", "workers"), [(64, 132), (128, 132), (256, 66)])
def test_few_tiles_of_a_head_wait_for_each_other(head_dim, workers):
    ordered = dataclasses.replace(equal_lengths(head_dim, 2048), accumulation=Accumulation.ORDERED)
    assert workers / plan_backward(ordered).heads_per_section <= ORDERED_TILES_OF_A_HEAD


@pytest.mark.parametrize("seqlen", [512, 2048, 16384])
@pytest.mark.parametrize(("head_dim", "workers"), [(128, 132), (256, 66)])
def test_the_last_section_lasts_longer_than_its_longest_tile(head_dim, workers, seqlen):
    plan = plan_backward(equal_lengths(head_dim, seqlen))
    block_m, block_n = plan.config.block_m, plan.config.block_n
    steps = [(seqlen - first_key) / block_m for first_key in range(0, seqlen, block_n)]
    assert plan.least_heads_in_last_section * sum(steps) / workers >= max(steps)
    assert plan_backward(equal_lengths(head_dim, seqlen, mask=MaskSpec(Mask.FULL))).least_heads_in_last_section == 1


def test_every_axis_makes_a_kernel_of_its_own():
    configs = [
        BackwardConfig(dtype, *dims, mask, layout, score, order, **dataclasses.asdict(backward_tile(*dims, score)))
        for dims in itertools.product(BACKWARD_HEAD_DIM_TILES, BACKWARD_HEAD_DIM_TILES)
        for dtype, mask, layout, score, order in itertools.product(Dtype, Mask, SeqLayout, Score, Accumulation)
    ]
    for config in configs:
        config.validate()
    assert len({config.key() for config in configs}) == len({config.name for config in configs}) == len(configs)


def test_shared_memory_of_a_tile():
    """README of csrc/kernels: two key tiles, two stages, two dS, dq, statistics and control."""
    assert plan_backward(PROBLEM).config.smem_bytes == (32 + 32 + 2 * (16 + 16) + 2 * 16 + 32 + 1 + 1) * 1024
    assert plan_backward(problem(head_dim=64, head_dim_v=64)).config.smem_bytes == 199_680
    # P, two dS of each CTA, half of the other's keys; statistics in three stages, filled up to whole KiB.
    wide = plan_backward(problem(head_dim=256, head_dim_v=256)).config
    assert wide.smem_bytes == (32 + 32 + 2 * 32 + 32 + 8 + 4 * 8 + 16 + 2) * 1024


def test_too_much_shared_memory():
    with pytest.raises(ConfigError, match=r"shared memory: \d+ bytes required by bwd_\w+, 232448 supported; reduce"):
        dataclasses.replace(plan_backward(PROBLEM).config, num_stages=4, num_dout_stages=4).validate()


def test_a_softcap_needs_narrow_blocks():
    with pytest.raises(ConfigError, match="block_m=128 is not supported; it must be 64 with a softcap"):
        config = plan_backward(problem(head_dim=64, head_dim_v=64)).config
        dataclasses.replace(config, score=Score.SOFTCAP).validate()


def test_wide_blocks_need_few_columns():
    with pytest.raises(ConfigError, match="block_m=128 is not supported; it must be 64 for more columns"):
        dataclasses.replace(plan_backward(PROBLEM).config, block_m=128).validate()


def test_dq_straight_from_registers_leaves_shared_memory_free():
    config = plan_backward(problem(head_dim=192, head_dim_v=128)).config
    direct = dataclasses.replace(config, dq_path=DqPath.DIRECT)
    direct.validate()
    assert config.smem_bytes - direct.smem_bytes == config.dq_staged_bytes == 32 * 1024


def test_split_columns_leave_no_room_for_dq():
    config = plan_backward(problem(head_dim=256, head_dim_v=256)).config
    with pytest.raises(ConfigError, match=r"dq_path=.*STAGED.* is not supported; it must be DIRECT"):
        dataclasses.replace(config, dq_path=DqPath.STAGED).validate()


def test_a_cluster_needs_whole_chunks_of_dq():
    config = plan_backward(problem(head_dim=192, head_dim_v=192)).config
    with pytest.raises(ConfigError, match="block_n=128 is not supported; it must be such that each warpgroup"):
        dataclasses.replace(config, block_n=128).validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_m", 72),
        ("block_m", 128),
        ("block_n", 64),
        ("block_n", 256),
        ("head_dim", 72),
        ("head_dim_v", 512),
        ("num_stages", 1),
        ("num_dout_stages", 0),
    ],
)
def test_configurations_that_cannot_be_built(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value} is not supported"):
        dataclasses.replace(plan_backward(PROBLEM).config, **{field: value}).validate()
