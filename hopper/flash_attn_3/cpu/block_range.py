"""Which keys a query row may see, and which key blocks a tile of rows visits.

The twin of ``csrc/kernels/core/block_range.h``: integers only, no tensors, so that both can be held against
brute force.

Every mask reduces to one interval of keys per query row, and both of its ends grow with the row. A tile
therefore needs the intervals of its first and last existing rows only: the keys that some row sees run from
the first row's begin to the last row's end, the keys that every row sees from the last row's begin to the
first row's end.
"""

from __future__ import annotations

import dataclasses

from ..problem import MaskSpec


@dataclasses.dataclass(frozen=True)
class BlockRange:
    """Key blocks of one tile; begin <= full_begin <= full_end <= end.

    Attributes:
        begin, end: the blocks [begin, end) are visited; no row of the tile sees a key of any other block.
        full_begin, full_end: in the blocks [full_begin, full_end) every existing row of the tile sees every
            key, so they need no mask. The other visited blocks do.
    """

    begin: int
    full_begin: int
    full_end: int
    end: int

    def is_full(self, n_block: int) -> bool:
        return self.full_begin <= n_block < self.full_end


def row_keys(mask: MaskSpec, row: int, len_q: int, len_k: int) -> range:
    """The keys that a query row of one sequence sees; empty if it sees none.

    The row sits at key position p = row + len_k - len_q, which is negative for the leading rows of a
    sequence with more queries than keys. Chunks are counted with floor semantics there, too.
    """
    position = row + len_k - len_q
    begin, end = 0, len_k
    if mask.window_left >= 0:
        begin = max(begin, position - mask.window_left)
    if mask.window_right >= 0:
        end = min(end, position + mask.window_right + 1)
    if mask.attention_chunk > 0:
        chunk_begin = position // mask.attention_chunk * mask.attention_chunk
        begin = max(begin, chunk_begin)
        end = min(end, chunk_begin + mask.attention_chunk)
    return range(begin, max(begin, end))


def block_range(mask: MaskSpec, m_block: int, block_m: int, block_n: int, len_q: int, len_k: int) -> BlockRange:
    """The key blocks of the tile with rows [m_block * block_m, (m_block + 1) * block_m) of one sequence.

    Args:
        mask: the normalised mask.
        m_block: index of the tile of query rows; its first row exists.
        block_m, block_n: rows of a tile, keys of a block.
        len_q, len_k: rows of the sequence that are in use on each side.
    """
    first = row_keys(mask, m_block * block_m, len_q, len_k)
    last = row_keys(mask, min(len_q, (m_block + 1) * block_m) - 1, len_q, len_k)
    begin = first.start // block_n
    end = max(begin, -(-last.stop // block_n))
    full_begin = -(-last.start // block_n)
    full_end = max(full_begin, first.stop // block_n)
    return BlockRange(begin, full_begin, full_end, end)
