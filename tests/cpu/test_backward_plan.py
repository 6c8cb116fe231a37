"""The planner of the backward pass."""

import dataclasses
import itertools

import pytest

from flash_attn_3.backward_config import Accumulation, BackwardConfig
from flash_attn_3.backward_plan import BACKWARD_TILES, BackwardProblem, backward_tile, plan_backward
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
    assert plan.config.name == "bwd_bf16_d128_causal_dense_scaled_unordered_m64n128"


@pytest.mark.parametrize(
    ("head_dims", "tiles", "blocks"),
    [
        ((8, 8), (64, 64), (128, 128)),
        ((64, 96), (64, 128), (64, 128)),
        ((40, 256), (64, 256), (64, 80)),
        ((72, 72), (96, 96), (64, 128)),
        ((192, 128), (192, 128), (64, 96)),
        ((136, 136), (192, 192), (64, 96)),
        ((256, 256), (256, 256), (64, 80)),
    ],
)
def test_head_dims_run_in_the_tiles_of_the_forward_pass(head_dims, tiles, blocks):
    """The wider of the two decides on the blocks."""
    config = plan_backward(problem(head_dim=head_dims[0], head_dim_v=head_dims[1])).config
    assert (config.head_dim, config.head_dim_v) == tiles
    assert (config.block_m, config.block_n) == blocks
    assert dataclasses.astuple(backward_tile(*head_dims)) == blocks


def test_values_too_wide():
    with pytest.raises(ValueError, match="head_dim_v=512 is not supported"):
        backward_tile(64, 512)


@pytest.mark.parametrize("empty", ["batch", "heads_q", "max_seqlen_k"])
def test_no_tiles(empty):
    assert plan_backward(problem(**{empty: 0})).num_tiles == 0


def test_too_many_tiles():
    with pytest.raises(ValueError, match="max_seqlen_k=536870912"):
        plan_backward(problem(max_seqlen_k=2**29, heads_q=1024))


def test_every_axis_makes_a_kernel_of_its_own():
    axes = (Dtype, Mask, SeqLayout, Score, Accumulation)
    configs = [
        BackwardConfig(dtype, tile, tile, mask, layout, score, order, *dataclasses.astuple(blocks))
        for dtype, mask, layout, score, order in itertools.product(*axes)
        for tile, blocks in BACKWARD_TILES.items()
    ]
    for config in configs:
        config.validate()
    assert len({config.key() for config in configs}) == len({config.name for config in configs}) == len(configs)


@pytest.mark.parametrize(("field", "value"), [("block_m", 72), ("block_n", 256), ("head_dim", 72), ("head_dim_v", 512)])
def test_configurations_that_cannot_be_built(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value} is not supported"):
        dataclasses.replace(plan_backward(PROBLEM).config, **{field: value}).validate()
