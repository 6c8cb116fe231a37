"""The planner of the backward pass."""

import dataclasses
import itertools

import pytest

from flash_attn_3.backward_config import Accumulation, BackwardConfig
from flash_attn_3.backward_plan import BackwardProblem, backward_tile, plan_backward
from flash_attn_3.config import ConfigError, Dtype, Mask, Score, SeqLayout
from flash_attn_3.problem import ForwardProblem, MaskSpec

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
    assert plan.num_tiles == 8 * 3 * 8
    assert plan.config == BackwardConfig(
        dtype=Dtype.BF16,
        head_dim=128,
        head_dim_v=128,
        mask=Mask.CAUSAL,
        seq_layout=SeqLayout.DENSE,
        score=Score.SCALED,
        accumulation=Accumulation.UNORDERED,
        block_m=64,
        block_n=128,
    )
    assert plan.config.name == "bwd_bf16_d128_causal_dense_scaled_unordered_m64n128s2"


@pytest.mark.parametrize(
    ("head_dims", "tiles", "blocks", "has_kernels"),
    [
        ((8, 8), (64, 64), (128, 128), True),
        ((64, 96), (64, 128), (64, 128), True),
        ((128, 64), (128, 64), (64, 128), True),
        ((72, 72), (128, 128), (64, 128), True),
        ((40, 256), (64, 256), (64, 80), False),
        ((192, 128), (192, 128), (64, 96), False),
        ((136, 136), (192, 192), (64, 96), False),
        ((256, 256), (256, 256), (64, 80), False),
    ],
)
def test_each_head_dim_runs_in_a_tile_of_its_own(head_dims, tiles, blocks, has_kernels):
    """The wider of the two decides on the blocks."""
    plan = plan_backward(problem(head_dim=head_dims[0], head_dim_v=head_dims[1]))
    assert (plan.config.head_dim, plan.config.head_dim_v) == tiles
    assert (plan.config.block_m, plan.config.block_n) == blocks
    assert plan.has_kernels == has_kernels
    assert dataclasses.astuple(backward_tile(*head_dims, Score.SCALED)) == blocks


def test_a_softcap_has_narrower_blocks():
    config = plan_backward(problem(head_dim=64, head_dim_v=64, score=Score.SOFTCAP)).config
    assert (config.block_m, config.block_n) == (64, 128)
    assert config == dataclasses.replace(config, block_m=backward_tile(64, 64, Score.SOFTCAP).block_m)


def test_values_too_wide():
    with pytest.raises(ValueError, match="head_dim_v=512 is not supported"):
        backward_tile(64, 512, Score.SCALED)


def test_scratch_for_dq():
    """One float for each column of the tile; with ordered additions a turn for each warpgroup's part of a block."""
    plan = plan_backward(problem(head_dim=72))
    assert plan.dq_scratch_floats(640) == 640 * 128
    ordered = plan_backward(dataclasses.replace(PROBLEM, accumulation=Accumulation.ORDERED))
    assert ordered.dq_scratch_floats(640) == 640 * 128 + 10 * 2


@pytest.mark.parametrize("empty", ["batch", "heads_q", "max_seqlen_k"])
def test_no_tiles(empty):
    assert plan_backward(problem(**{empty: 0})).num_tiles == 0


def test_too_many_tiles():
    for side in ("max_seqlen_q", "max_seqlen_k"):
        with pytest.raises(ValueError, match=f"{side}=536870912"):
            plan_backward(problem(**{side: 2**29}, heads_q=1024))


def test_every_axis_makes_a_kernel_of_its_own():
    configs = [
        BackwardConfig(dtype, *dims, mask, layout, score, order, *dataclasses.astuple(backward_tile(*dims, score)))
        for dims in itertools.product((64, 128), (64, 128))
        for dtype, mask, layout, score, order in itertools.product(Dtype, Mask, SeqLayout, Score, Accumulation)
    ]
    for config in configs:
        config.validate()
    assert len({config.key() for config in configs}) == len({config.name for config in configs}) == len(configs)


def test_shared_memory_of_a_tile():
    """README of csrc/kernels: two key tiles, two stages, two dS, dq, statistics and control."""
    assert plan_backward(PROBLEM).config.smem_bytes == (32 + 32 + 2 * (16 + 16) + 2 * 16 + 32 + 1 + 1) * 1024
    assert plan_backward(problem(head_dim=64, head_dim_v=64)).config.smem_bytes == 199_680


def test_too_much_shared_memory():
    with pytest.raises(ConfigError, match=r"shared memory: \d+ bytes required by bwd_\w+, 232448 supported; reduce"):
        dataclasses.replace(plan_backward(PROBLEM).config, num_stages=4).validate()


def test_a_softcap_needs_narrow_blocks():
    with pytest.raises(ConfigError, match="block_m=128 is not supported; it must be 64 with a softcap"):
        dataclasses.replace(plan_backward(PROBLEM).config, block_m=128, score=Score.SOFTCAP).validate()


@pytest.mark.parametrize(
    ("field", "value"), [("block_m", 72), ("block_n", 256), ("head_dim", 72), ("head_dim_v", 512), ("num_stages", 1)]
)
def test_configurations_that_cannot_be_built(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value} is not supported"):
        dataclasses.replace(plan_backward(PROBLEM).config, **{field: value}).validate()
