"""How evenly a causal launch ends: the planner's sections and the kernels' order of tiles, on a model of the GPU."""

import ctypes
import heapq

import pytest

import host_headers
from flash_attn_3.config import Dtype, Mask, Score, SeqLayout
from flash_attn_3.heuristics import plan_forward
from flash_attn_3.problem import UNLIMITED, ForwardProblem, MaskSpec

TOKENS, FEATURES, NUM_SMS = 16384, 2048, 132
#: What a tile costs beside its key blocks, in key blocks.
TILE_OVERHEAD = 0.7


class TilePosition(ctypes.Structure):
    _fields_ = (("m_block", ctypes.c_int32), ("head", ctypes.c_int32))


def occupancy(head_dim: int, seqlen: int) -> float:
    """Share of the launch's time in which its multiprocessors work, each taking the next tile when it is free."""
    batch, heads = TOKENS // seqlen, FEATURES // head_dim
    problem = ForwardProblem(
        *(Dtype.BF16, batch, seqlen, seqlen, heads, heads, head_dim, head_dim),
        *(MaskSpec(Mask.CAUSAL, UNLIMITED, 0), Score.SCALED, SeqLayout.DENSE, NUM_SMS),
    )
    plan = plan_forward(problem)
    num_m_blocks = -(-seqlen // plan.config.block_m)
    sections = plan.heads_per_section, plan.least_heads_in_last_section
    position = TilePosition()
    free_at, work = [0.0] * NUM_SMS, 0.0
    for index in range(num_m_blocks * batch * heads):
        host_headers.build("scheduler_shim.cc").tile_position(
            list(Mask).index(Mask.CAUSAL), index, num_m_blocks, batch * heads, *sections, ctypes.byref(position)
        )
        keys = min(seqlen, (position.m_block + 1) * plan.config.block_m)
        cost = TILE_OVERHEAD - (-keys // plan.config.block_n)
        heapq.heapreplace(free_at, free_at[0] + cost)
        work += cost
    return work / NUM_SMS / max(free_at)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
def test_causal_launches_keep_all_multiprocessors_busy(head_dim, seqlen):
    assert occupancy(head_dim, seqlen) >= 0.96
