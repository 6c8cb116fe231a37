"""Models behind entries of LOG.md: what can be said of a kernel without a GPU.

python -m benchmarks.models accumulator    # what a truncating accumulator makes of very long sums; 20 s
python -m benchmarks.models balance        # how evenly causal launches end
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys

import numpy as np

from flash_attn_3.config import Dtype, Mask, Score, SeqLayout
from flash_attn_3.heuristics import plan_forward
from flash_attn_3.problem import UNLIMITED, ForwardProblem, MaskSpec

HEAD_DIM, ROWS, MMA_DEPTH = 64, 8, 16
TOKENS, FEATURES, NUM_SMS = 16384, 2048, 132
#: What a tile costs beside its key blocks, in key blocks.
TILE_OVERHEAD = 0.7


def truncated(x: np.ndarray) -> np.ndarray:
    """To 24 bits of mantissa, towards zero."""
    nearest = x.astype(np.float32)
    too_large = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(too_large, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


def accumulate(num_keys: int, keys_per_level: int) -> tuple[float, float]:
    """(scale, cosine distance) of a random output whose accumulator is truncated after each 16 keys.

    After every `keys_per_level` keys it is added to a second level, which rounds, and begins anew.
    """
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((ROWS, num_keys))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact, accumulator = np.zeros((ROWS, HEAD_DIM)), np.zeros((ROWS, HEAD_DIM))
    second = np.zeros((ROWS, HEAD_DIM), dtype=np.float32)
    for key in range(0, num_keys, MMA_DEPTH):
        product = weights[:, key : key + MMA_DEPTH] @ draw.standard_normal((MMA_DEPTH, HEAD_DIM))
        exact += product
        accumulator = truncated(accumulator + product)
        if (key + MMA_DEPTH) % keys_per_level == 0:
            second += accumulator.astype(np.float32)
            accumulator[:] = 0.0
    found = second + accumulator
    dot = (found * exact).sum()
    return dot / (exact**2).sum(), 1.0 - dot / math.sqrt((found**2).sum() * (exact**2).sum())


def sections(num_heads: int, heads: int, least_last: int) -> list[range]:
    """Heads worked on together: sections of `heads`, the last of at least `least_last`."""
    bounds = [0]
    while num_heads - bounds[-1] - heads >= max(1, least_last):
        bounds.append(bounds[-1] + heads)
    return [range(*ends) for ends in zip(bounds, [*bounds[1:], num_heads], strict=True)]


def occupancy(head_dim: int, seqlen: int, heads: int | None = None, last: float = 0.0) -> float:
    """Share of a causal launch's time in which its multiprocessors work, each taking the next tile when it is free.

    heads: in a section; the planner's number by default. last: heads in the last section at least, in units of those
    that keep all multiprocessors busy as long as the longest tile takes.
    """
    num_heads = FEATURES // head_dim * (TOKENS // seqlen)
    problem = ForwardProblem(
        *(Dtype.BF16, TOKENS // seqlen, seqlen, seqlen, FEATURES // head_dim, FEATURES // head_dim, head_dim, head_dim),
        *(MaskSpec(Mask.CAUSAL, UNLIMITED, 0), Score.SCALED, SeqLayout.DENSE, NUM_SMS),
    )
    plan = plan_forward(problem)
    block_m, block_n = plan.config.block_m, plan.config.block_n
    ends = [min(seqlen, end) for end in range(block_m, seqlen + block_m, block_m)]
    costs = [TILE_OVERHEAD - (-end // block_n) for end in ends]
    least_last = math.ceil(last * NUM_SMS * ends[-1] / sum(ends)) if last else 0
    free_at, work = [0.0] * NUM_SMS, 0.0
    for section in sections(num_heads, heads or plan.heads_per_section, least_last):
        for cost in reversed(costs):
            for _ in section:
                heapq.heapreplace(free_at, free_at[0] + cost)
                work += cost
    return work / NUM_SMS / max(free_at)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["accumulator", "balance"])
    if parser.parse_args(arguments).model == "accumulator":
        for keys_per_level in (2**22, 2**18):
            scale, distance = accumulate(2**22, keys_per_level)
            print(f"2^22 keys, {keys_per_level} a level: scale {scale:.4f}, cosine distance {distance:.1e}")
        return
    print("head dim, S: occupancy with the planner's sections; with 5 heads each; with a last section of 1.5")
    for head_dim in (64, 128, 256):
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
            shares = occupancy(head_dim, seqlen), occupancy(head_dim, seqlen, 5), occupancy(head_dim, seqlen, last=1.5)
            print(f"{head_dim}, {seqlen}: " + "; ".join(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main(sys.argv[1:])
