"""Where sequences lie and how long they are: the kernels' header, run on the host, against brute force (L1, L6)."""

import ctypes
import dataclasses

from hypothesis import example, given, settings
from hypothesis import strategies as st

import fake_cuda
import host_headers
from flash_attn_3 import backward_plan
from flash_attn_3.config import SeqLayout
from tensor_maps import ELEMENT_BYTES, Geometry

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
#: The most rows past a sequence's end that a tile asks for.
MAX_BLOCK = 256
INT32_POINTER = ctypes.POINTER(ctypes.c_int32)
ADDRESS = 2**47


class ShimSide(ctypes.Structure):
    _fields_ = (("seqlen", ctypes.c_int32), ("cu_seqlens", INT32_POINTER), ("seqused", INT32_POINTER))


class Sequence(ctypes.Structure):
    _fields_ = (("length", ctypes.c_int32), ("offset", ctypes.c_int32), ("batch", ctypes.c_int32))


@dataclasses.dataclass(frozen=True)
class Side:
    """Queries or keys: `seqlen` rows each in dense storage, else `segments` rows in packed storage; and seqused."""

    seqlen: int
    segments: list[int] | None = None
    used: list[int] | None = None

    def row_numbers(self, batch: int) -> list[int]:
        """The rows of one sequence that take part, counted from the first row of its storage."""
        first = 0 if self.segments is None else sum(self.segments[:batch])
        rows = range(self.seqlen if self.segments is None else self.segments[batch])
        return [first + row for row in rows if self.used is None or row < self.used[batch]]

    def for_shim(self) -> ShimSide:
        cu_seqlens = None
        if self.segments is not None:
            cu_seqlens = int32_array([sum(self.segments[:i]) for i in range(len(self.segments) + 1)])
        return ShimSide(self.seqlen, cu_seqlens, None if self.used is None else int32_array(self.used))


def int32_array(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)


def sequences(layout: SeqLayout, q: Side, k: Side, batch: int) -> list[Sequence]:
    """The header's answer for queries and keys."""
    result = (Sequence * 2)()
    shim_q, shim_k = q.for_shim(), k.for_shim()
    index = list(SeqLayout).index(layout)
    host_headers.build("seqlen_shim.cc").sequences(index, ctypes.byref(shim_q), ctypes.byref(shim_k), batch, result)
    return list(result)


def map_coordinates(sequence: Sequence, bound: int, row: int) -> tuple[int, int, int, int, int]:
    """{column, head, row, origin, batch} of the row's first element."""
    shim = host_headers.build("seqlen_shim.cc")
    pointer = ctypes.byref(sequence)
    return 0, 0, shim.map_row(pointer, bound, row), shim.map_origin(pointer), sequence.batch


def sides(num_sequences: int) -> st.SearchStrategy[Side]:
    """With and without cu_seqlens and seqused; used lengths may be negative, or exceed the segment."""

    def per_sequence(values: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
        return st.lists(values, min_size=num_sequences, max_size=num_sequences)

    length = st.integers(0, 12)
    used = st.one_of(st.integers(-2, 15), st.sampled_from((INT32_MIN, INT32_MAX)))
    return st.builds(Side, length, st.none() | per_sequence(length), st.none() | per_sequence(used))


@st.composite
def varlen_calls(draw: st.DrawFn) -> tuple[int, Side, Side]:
    """(batch, queries, keys)"""
    batch = draw(st.integers(1, 6))
    return batch, draw(sides(batch)), draw(sides(batch))


@settings(max_examples=1500)
@given(varlen_calls())
@example((2, Side(9, [4, 3], [6, -1]), Side(7, None, [9, 2])))
@example((2, Side(9, None, [3, 12]), Side(7, [5, 0], None)))
def test_varlen_sequences_match_brute_force(call):
    """L6: a used length outside the segment is cut to it, so that no neighbour's rows are read."""
    num_sequences, *both = call
    for batch in range(num_sequences):
        for side, found in zip(both, sequences(SeqLayout.VARLEN, *both, batch), strict=True):
            rows = side.row_numbers(batch)
            assert found.length == len(rows)
            assert list(range(found.offset, found.offset + found.length)) == rows or not rows
            assert found.offset == (sum(side.segments[:batch]) if side.segments is not None else 0)
            assert found.batch == (0 if side.segments is not None else batch)


@given(st.integers(0, INT32_MAX), st.integers(0, INT32_MAX), st.integers(0, INT32_MAX))
def test_dense_sequences_are_whole(seqlen_q, seqlen_k, batch):
    found = sequences(SeqLayout.DENSE, Side(seqlen_q), Side(seqlen_k), batch)
    assert [(s.length, s.offset, s.batch) for s in found] == [(seqlen_q, 0, batch), (seqlen_k, 0, batch)]


@settings(max_examples=500)
@given(varlen_calls())
def test_every_row_of_a_sequence_is_addressed_through_the_tensor_map(call):
    """L1, L6: each row that takes part is found in its storage, and a tile's rows behind them are out of bounds."""
    num_sequences, *both = call
    for batch in range(num_sequences):
        for side, sequence in zip(both, sequences(SeqLayout.VARLEN, *both, batch), strict=True):
            packed = side.segments is not None
            bound = max(1, sum(side.segments) if packed else side.seqlen)  # a map has at least one row
            shape = (bound, 1, 64) if packed else (num_sequences, bound, 1, 64)
            geometry = Geometry(fake_cuda.tensor(shape, address=ADDRESS))
            first_row = 0 if packed else batch * bound
            rows = side.row_numbers(batch)
            for r in range(len(rows) + 4):
                asked = map_coordinates(sequence, bound, r)
                assert geometry.in_bounds(asked) == (r < len(rows))
                if r < len(rows):
                    assert geometry.address(asked) == ADDRESS + ELEMENT_BYTES * 64 * (first_row + rows[r])


@st.composite
def long_sequences(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(rows of the storage, offset, length, row) up to the largest that a map can hold."""
    bound = draw(st.integers(1, INT32_MAX))
    offset = draw(st.integers(0, bound))
    length = draw(st.integers(0, bound - offset))
    # Rows behind the end are asked for in boxes that begin before it; a box's own arithmetic is not in 32 bits.
    inside = st.integers(0, max(0, length - 1))
    behind = st.integers(length, length + min(MAX_BLOCK, INT32_MAX - bound))
    return bound, offset, length, draw(st.one_of(inside, behind))


@settings(max_examples=1500)
@given(long_sequences())
@example((INT32_MAX, INT32_MAX - 5, 5, 4))
@example((INT32_MAX, 0, INT32_MAX, INT32_MAX - 1))
def test_coordinates_of_long_storage_fit_in_32_bits(case):
    """L1: row + origin counts from `bound` rows before the tensor; a row is out of bounds iff it is past the length."""
    bound, offset, length, row = case
    _, _, map_row, map_origin, _ = map_coordinates(Sequence(length, offset, 0), bound, row)
    assert map_row + map_origin == bound + offset + row
    assert map_row >= 0
    assert 0 <= map_origin <= bound
    assert (map_row >= bound) == (row >= length)


# -- the backward pass -----------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(st.data())
def test_every_stored_row_is_used_or_cleared_once(data):
    """N9, N11: rows past seqused, and before and behind all segments, are cleared; rows in use are not."""
    num_sequences = data.draw(st.integers(1, 4))
    side = data.draw(sides(num_sequences))
    packed = side.segments is not None
    before, behind = (data.draw(st.integers(0, 5)) if packed else 0 for _ in range(2))
    stored = before + sum(side.segments) + behind if packed else side.seqlen
    offsets = None
    if packed:
        offsets = int32_array([before + sum(side.segments[:i]) for i in range(num_sequences + 1)])
    shim = host_headers.build("seqlen_shim.cc")
    shim_side = ShimSide(side.seqlen, offsets, None if side.used is None else int32_array(side.used))
    visits = [[0] * stored for _ in range(1 if packed else num_sequences)]
    for batch in range(num_sequences):
        result = (Sequence * 2)()
        index = list(SeqLayout).index(SeqLayout.VARLEN)
        shim.sequences(index, ctypes.byref(shim_side), ctypes.byref(shim_side), batch, result)
        sequence, gap = result[0], (ctypes.c_int * 2)()
        shim.rows_behind(ctypes.byref(sequence), batch, num_sequences, stored, offsets, gap)
        used = range(sequence.offset, sequence.offset + sequence.length)
        leading = range(before) if batch == 0 else ()
        for row in (*used, *range(*gap), *leading):
            visits[sequence.batch][row] += 1
    assert all(count == 1 for rows in visits for count in rows)


@settings(max_examples=500)
@given(st.lists(st.integers(0, 300), max_size=6), st.sampled_from((64, 128)))
def test_scratch_of_packed_sequences(lengths, block_m):
    """N10: the header and the planner lay statistics out alike, in whole blocks that no two sequences share."""
    end, first_row = 0, 0
    for batch, length in enumerate(lengths):
        offset = host_headers.build("seqlen_shim.cc").padded_offset(first_row, batch, block_m)
        assert offset == backward_plan.padded_offset(first_row, batch, block_m)
        assert offset % block_m == 0 and offset >= end
        end, first_row = offset + backward_plan.round_up(length, block_m), first_row + length
    assert end <= backward_plan.padded_rows(first_row, len(lengths), block_m)


@settings(max_examples=500)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    before=st.integers(0, 200),
    behind=st.integers(0, 200),
    block_rows=st.sampled_from((64, 128)),
)
def test_numbers_of_packed_blocks(lengths, before, behind, block_rows):
    """Each block of each sequence has one, in the order of the blocks; other numbers' blocks have no rows."""
    shim = host_headers.build("seqlen_shim.cc")
    offsets = [before + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    found = []
    for number in range(shim.num_packed_blocks(offsets[-1] + behind, len(lengths), block_rows)):
        block = (ctypes.c_int * 2)()
        shim.packed_block(int32_array(offsets), len(lengths), number, block_rows, block)
        batch, place = block
        assert place >= 0
        if place * block_rows < lengths[batch]:
            found.append((batch, place))
    assert found == [(b, i) for b, length in enumerate(lengths) for i in range(-(-length // block_rows))]
