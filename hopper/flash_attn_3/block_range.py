"""Which keys a query row may see, which key blocks a tile of rows visits, and both the other way round.

The twin of ``csrc/kernels/core/block_range.h``: integers only, no tensors, so that both can be held against
brute force.

Every mask reduces to one interval of keys per query row, and both of its ends grow with the row. A tile
therefore needs the intervals of its first and last existing rows only: the keys that some row sees run from
the first row's begin to the last row's end, the keys that every row sees from the last row's begin to the
first row's end. The same holds for the interval of rows that see a key, which the backward pass goes by.
"""

from __future__ import annotations

import dataclasses

from .problem import MaskSpec


@dataclasses.dataclass(frozen=True)
class BlockRange:
    """Key blocks of one tile of rows, or query blocks of one block of keys; begin <= full_begin <= full_end <= end.

    Attributes:
        begin, end: the blocks [begin, end) are visited; no row sees a key in any other block.
        full_begin, full_end: in the blocks [full_begin, full_end) every existing row sees every key, and all of the
            block's keys exist, so they need no mask. The other visited blocks do.
    """

    begin: int
    full_begin: int
    full_end: int
    end: int

    def is_full(self, block: int) -> bool:
        return self.full_begin <= block < self.full_end


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


def key_rows(mask: MaskSpec, key: int, len_q: int, len_k: int) -> range:
    """The query rows of one sequence that see a key; empty if none does. The transpose of `row_keys`."""
    # Positions p first, then rows p + len_q - len_k.
    begin, end = len_k - len_q, len_k
    if mask.window_left >= 0:
        end = min(end, key + mask.window_left + 1)
    if mask.window_right >= 0:
        begin = max(begin, key - mask.window_right)
    if mask.attention_chunk > 0:
        chunk_begin = key // mask.attention_chunk * mask.attention_chunk
        begin = max(begin, chunk_begin)
        end = min(end, chunk_begin + mask.attention_chunk)
    first_position = len_k - len_q
    return range(begin - first_position, max(begin, end) - first_position)


def query_block_range(mask: MaskSpec, n_block: int, block_m: int, block_n: int, len_q: int, len_k: int) -> BlockRange:
    """The query blocks that a block of keys [n_block * block_n, (n_block + 1) * block_n) of one sequence is seen by.

    A last query block with fewer rows than the others may count as full: rows that do not exist have an infinite
    log-sum-exp in the backward pass, hence no weight. A last key block with fewer keys has no full query block: such a
    key has score 0, whose weight beside a very low log-sum-exp overflows.

    Args:
        mask: the normalised mask.
        n_block: index of the block of keys; its first key exists.
        block_m, block_n: rows and keys of a block.
        len_q, len_k: rows of the sequence that are in use on each side.
    """
    first = key_rows(mask, n_block * block_n, len_q, len_k)
    last = key_rows(mask, min(len_k, (n_block + 1) * block_n) - 1, len_q, len_k)
    begin = first.start // block_m
    end = max(begin, -(-last.stop // block_m))
    full_begin = -(-last.start // block_m)
    full_end = full_begin
    if (n_block + 1) * block_n <= len_k:
        last_full = -(-len_q // block_m) if first.stop == len_q else first.stop // block_m
        full_end = max(full_begin, last_full)
    return BlockRange(begin, full_begin, full_end, end)
