"""What limits a block of keys in the forward pass: clocks of one multiprocessor's units, for one warpgroup's 64 rows.

csrc/kernels/README.md has the table, and says what the formulas count.
"""

from __future__ import annotations

import dataclasses

from flash_attn_3.config import WARPGROUP_ROWS

#: (head_dim, head_dim_v, block_m, block_n) of the table's rows; wider values than MAX_VALUE_TILE take two passes.
TILES = (
    (64, 64, 192, 128),
    (64, 64, 128, 128),
    (64, 128, 128, 128),
    (64, 256, 128, 80),
    (64, 512, 128, 80),
    (96, 96, 128, 128),
    (128, 128, 128, 128),
    (192, 128, 128, 128),
    (192, 192, 128, 112),
    (256, 256, 128, 80),
)


@dataclasses.dataclass(frozen=True)
class BlockClocks:
    """Clocks that each unit takes, if nothing waits."""

    tensor_cores: int
    exponentials: int
    shared_memory: int
    issue_slots: int

    @classmethod
    def of(cls, head_dim: int, head_dim_v: int, block_m: int, block_n: int, passes: int = 1) -> BlockClocks:
        """Of all passes over the columns of v, `head_dim_v` each."""
        operands = head_dim * (WARPGROUP_ROWS + block_n) + block_n * head_dim_v
        copied = block_n * (head_dim + head_dim_v) * WARPGROUP_ROWS // block_m
        return cls(
            tensor_cores=passes * (head_dim + head_dim_v) * block_n // 32,
            exponentials=passes * 4 * block_n,
            shared_memory=passes * (operands + copied) // 64,
            issue_slots=passes * (9 * block_n // 4 + head_dim_v // 2 + 100),
        )


def table_row(head_dim: int, head_dim_v: int, block_m: int, block_n: int, widest_pass: int) -> str:
    """A row of the table; values wider than `widest_pass` take several passes."""
    passes = -(-head_dim_v // widest_pass)
    clocks = BlockClocks.of(head_dim, head_dim_v // passes, block_m, block_n, passes)
    dims = str(head_dim) if head_dim == head_dim_v else f"{head_dim}, {head_dim_v}"
    words = [dims + (", two passes" if passes == 2 else ""), f"{block_m} x {block_n}"]
    return f"| {' | '.join(map(str, [*words, *dataclasses.astuple(clocks)]))} |"
