"""The order of tiles and the schedulers against brute force: the kernels' headers, run on the host.

The emulator plays a launch whose CTAs take turns in any order that hypothesis thinks of.
"""

import ctypes
import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import host_headers
from flash_attn_3.config import WARPGROUP_ROWS, Mask, SeqLayout
from flash_attn_3.heuristics import MAX_TILES

#: Around one and two scans of 32 sequences.
BATCHES = (0, 1, 2, 31, 32, 33, 64, 65, 100)
MAX_LENGTH = 18
#: Tiles of 128 rows then have 2, 4, 8, 10 and 128 positions.
PACKED_HEADS = (64, 22, 16, 12, 1)
#: Enough that sequences are told apart by their keys, 16 of which are one to the scheduler; and that they make classes.
KEYS = st.one_of(st.integers(0, 90), st.integers(900, 10**5))
#: Octaves of lengths beside the longest that are classes of their own, unless they hold so few keys.
OTHER_CLASSES, FEW_KEYS = 4, 1024
INT32_MAX = 2**31 - 1

INT32_POINTER = ctypes.POINTER(ctypes.c_int32)

#: (batch, m_block, (head, value pass) pair)
Tile = tuple[int, int, int]


class TilePosition(ctypes.Structure):
    _fields_ = (("m_block", ctypes.c_int32), ("head", ctypes.c_int32))


class TileCounter(ctypes.Structure):
    _fields_ = (("taken", ctypes.c_int32), ("finished", ctypes.c_int32))


class HandedTile(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("cta", "batch", "m_block", "head"))


class ShimProblem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "heads_q", "packed_heads")),
        *((name, ctypes.c_int32) for name in ("num_value_passes", "heads_per_section", "least_last")),
        *((name, ctypes.c_int32) for name in ("seqlen_q", "seqlen_k")),
        *((name, ctypes.c_int32) for name in ("window_left", "window_right", "attention_chunk")),
        *((name, INT32_POINTER) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")),
    )


@dataclasses.dataclass(frozen=True)
class Side:
    """Queries or keys.

    Attributes:
        seqlen: rows of each sequence in dense storage; of packed storage the caller's max_seqlen.
        segments: rows of each sequence in packed storage; None: dense storage.
        used: seqused; None: the call has none.
    """

    seqlen: int
    segments: tuple[int, ...] | None = None
    used: tuple[int, ...] | None = None

    def lengths(self, batch: int) -> list[int]:
        rows = self.segments if self.segments is not None else (self.seqlen,) * batch
        return [len([r for r in range(n) if self.used is None or r < self.used[b]]) for b, n in enumerate(rows)]

    def cu_seqlens(self) -> list[int] | None:
        return None if self.segments is None else list(itertools.accumulate(self.segments, initial=0))


@dataclasses.dataclass(frozen=True)
class Problem:
    mask: Mask
    layout: SeqLayout
    batch: int
    head_groups: int
    packed_heads: int
    num_value_passes: int
    heads_per_section: int
    least_last: int
    q: Side
    k: Side
    window: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0

    def tiles(self) -> list[Tile]:
        """Every tile, in the order of schedule.h: numbered over the whole batch, or sequence by sequence."""
        heads = self.head_groups * self.num_value_passes
        positions = shim().block_m() // WARPGROUP_ROWS * (WARPGROUP_ROWS // self.packed_heads)
        if self.layout is SeqLayout.DENSE:
            order = in_order(
                *(self.mask, -(-self.q.seqlen // positions), heads * self.batch),
                *(self.heads_per_section, self.least_last),
            )
            return [(triple // heads, m_block, triple % heads) for m_block, triple in order]
        tiles = []
        lens_q, lens_k = self.q.lengths(self.batch), self.k.lengths(self.batch)
        keys = [self.visible_keys(length) for length in lens_k]
        classes = self.length_classes(keys)
        # Of a class, of every 32 sequences those with the most keys come first, as far as 16 keys tell.
        for batch in sorted(range(self.batch), key=lambda b: (-classes[b], b // 32, -(keys[b] // 16), b)):
            len_q, len_k = lens_q[batch], lens_k[batch]
            # As many heads as have the keys of heads_per_section longest sequences.
            section = self.heads_per_section * max(1, self.k.seqlen) // max(1, len_k)
            order = in_order(self.mask, -(-len_q // positions), heads, min(heads, max(1, section)), 0)
            tiles += [(batch, m_block, head) for m_block, head in order]
        return tiles

    def visible_keys(self, length: int) -> int:
        """Of a sequence of so many keys, how many a row sees at most."""
        limits = [length]
        if self.mask is Mask.LOCAL:
            limits += [sum(self.window) + 1] if min(self.window) >= 0 else []
            limits += [self.attention_chunk] if self.attention_chunk > 0 else []
        return min(limits)

    def length_classes(self, keys: Sequence[int]) -> list[int]:
        """Of each sequence: its octave, but what is far shorter than the longest, or short, is one class."""
        few = octave(max(FEW_KEYS, self.batch))
        if self.batch <= 32 or octave(self.visible_keys(self.k.seqlen)) <= few:
            return [0] * len(keys)
        last = max(few, max(map(octave, keys)) - OTHER_CLASSES)
        return [max(last, octave(n)) for n in keys]


@dataclasses.dataclass(frozen=True)
class Launch:
    """`turns` says which of the CTAs that have not ended goes on next (modulo their number), over and over."""

    num_ctas: int
    turns: bytes = b"\0"


def octave(length: int) -> int:
    return max(1, length).bit_length() - 1


def section_bounds(num_heads: int, heads_per_section: int, least_last: int) -> list[int]:
    """Where sections begin, and the end of the last one: sections are cut off as long as enough heads are left."""
    bounds = [0]
    while num_heads - bounds[-1] - heads_per_section >= max(1, least_last):
        bounds.append(bounds[-1] + heads_per_section)
    return [*bounds, num_heads]


def in_order(
    mask: Mask, num_m_blocks: int, num_heads: int, heads_per_section: int, least_last: int
) -> list[tuple[int, int]]:
    """(m_block, head) pairs."""
    if mask is Mask.FULL:
        return [(m_block, head) for head in range(num_heads) for m_block in range(num_m_blocks)]
    return [
        (m_block, head)
        for first, end in itertools.pairwise(section_bounds(num_heads, heads_per_section, least_last))
        for m_block in reversed(range(num_m_blocks))
        for head in range(first, end)
    ]


def shim() -> ctypes.CDLL:
    library = host_headers.build_scheduler()
    library.launch.restype = ctypes.c_char_p
    return library


def tile_position(mask: Mask, *arguments: int) -> tuple[int, int]:
    position = TilePosition()
    shim().tile_position(list(Mask).index(mask), *arguments, ctypes.byref(position))
    return position.m_block, position.head


def int32_array(values: Sequence[int] | None) -> ctypes.Array | None:
    return None if values is None else (ctypes.c_int32 * len(values))(*values)


def launch_grid(problem: Problem, launch: Launch, counter: TileCounter, max_tiles: int) -> list[tuple[int, Tile]]:
    """Runs a launch. Returns (CTA, tile) pairs in the order in which they were handed out."""
    index_arrays = problem.q.cu_seqlens(), problem.k.cu_seqlens(), problem.q.used, problem.k.used
    arguments = ShimProblem(
        *(problem.batch, problem.head_groups * problem.packed_heads, problem.packed_heads),
        *(problem.num_value_passes, problem.heads_per_section, problem.least_last),
        *(problem.q.seqlen, problem.k.seqlen, *problem.window, problem.attention_chunk),
        *map(int32_array, index_arrays),
    )
    handed = (HandedTile * max_tiles)()
    num_handed = ctypes.c_int32()
    error = shim().launch(
        *(list(Mask).index(problem.mask), list(SeqLayout).index(problem.layout), ctypes.byref(arguments)),
        *(ctypes.byref(counter), launch.num_ctas, launch.turns, len(launch.turns)),
        *(max_tiles, handed, ctypes.byref(num_handed)),
    )
    assert error == b"", error.decode()
    return [(tile.cta, (tile.batch, tile.m_block, tile.head)) for tile in handed[: num_handed.value]]


def check_launches(problem: Problem, launches: Sequence[Launch]) -> None:
    """Launches that share a counter, one behind the other, as they do on a stream."""
    tiles = problem.tiles()
    place = {tile: i for i, tile in enumerate(tiles)}
    counter = TileCounter(0, 0)
    for launch in launches:
        handed = launch_grid(problem, launch, counter, len(tiles) + launch.num_ctas)
        assert sorted(tile for _, tile in handed) == sorted(tiles)
        for cta in range(launch.num_ctas):
            places = [place[tile] for owner, tile in handed if owner == cta]
            assert places == sorted(places), f"CTA {cta} goes back"
        assert (counter.taken, counter.finished) == (0, 0)


# -- schedule.h ------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(st.sampled_from(Mask), st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 14))
def test_positions_are_a_bijection(mask, num_m_blocks, num_heads, heads_per_section, least_last):
    count = num_m_blocks * num_heads
    arguments = num_m_blocks, num_heads, heads_per_section, least_last
    positions = [tile_position(mask, i, *arguments) for i in range(count)]
    assert sorted(positions) == list(itertools.product(range(num_m_blocks), range(num_heads)))


@settings(max_examples=500)
@given(
    *(st.sampled_from([Mask.CAUSAL, Mask.LOCAL]), st.integers(1, 12), st.integers(1, 12)),
    *(st.integers(1, 14), st.integers(0, 14)),
)
def test_sections_hold_whole_heads_and_start_with_the_longest_tiles(
    mask, num_m_blocks, num_heads, heads_per_section, least_last
):
    arguments = num_m_blocks, num_heads, heads_per_section, least_last
    positions = [tile_position(mask, i, *arguments) for i in range(num_m_blocks * num_heads)]
    bounds = section_bounds(num_heads, heads_per_section, least_last)
    assert bounds[-1] - bounds[-2] >= min(least_last, num_heads)
    for heads in itertools.starmap(range, itertools.pairwise(bounds)):
        first = heads.start
        section = positions[first * num_m_blocks : heads.stop * num_m_blocks]
        assert {head for _, head in section} == set(heads)
        m_blocks = [m_block for m_block, _ in section]
        assert m_blocks == sorted(m_blocks, reverse=True)


@st.composite
def large_positions(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(index, num_m_blocks, num_heads, heads_per_section, least_last) of as many tiles as a launch may have."""
    num_m_blocks = draw(st.one_of(st.integers(1, 2**11), st.integers(1, MAX_TILES)))
    num_heads = draw(st.integers(1, MAX_TILES // num_m_blocks))
    last = num_m_blocks * num_heads - 1
    index = draw(st.one_of(st.integers(0, last), st.integers(max(0, last - 5), last)))
    return index, num_m_blocks, num_heads, draw(st.integers(1, num_heads)), draw(st.integers(0, 2 * num_heads))


@settings(max_examples=1000)
@given(st.sampled_from(Mask), large_positions())
def test_large_positions_lead_back_to_their_index(mask, arguments):
    """I5: 32 bits are enough for every index."""
    index, num_m_blocks, num_heads, heads_per_section, least_last = arguments
    m_block, head = tile_position(mask, *arguments)
    assert 0 <= m_block < num_m_blocks
    assert 0 <= head < num_heads
    if mask is not Mask.FULL:
        last = max(0, num_heads - max(1, least_last)) // heads_per_section * heads_per_section
        first = min(last, head - head % heads_per_section)
        heads = num_heads - first if first == last else heads_per_section
        assert index == first * num_m_blocks + (num_m_blocks - 1 - m_block) * heads + head - first
    else:
        assert index == head * num_m_blocks + m_block


# -- scheduler.cuh ---------------------------------------------------------------------------------------------

launches = st.lists(st.builds(Launch, st.integers(1, 8), st.binary(min_size=1, max_size=24)), min_size=2, max_size=2)


def problems(layout: SeqLayout, batch: int, q: Side, k: Side) -> st.SearchStrategy[Problem]:
    # Value passes, heads in a section, in the last one at least.
    numbers = (st.integers(*ends) for ends in ((1, 3), (1, 8), (0, 12)))
    groups = st.integers(1, 3), st.sampled_from(PACKED_HEADS)
    fixed = map(st.just, (layout, batch))
    window = st.tuples(*[st.one_of(st.just(-1), st.integers(0, 10**4))] * 2)
    chunk = st.one_of(st.just(0), st.integers(1, 10**4))
    return st.builds(Problem, st.sampled_from(Mask), *fixed, *groups, *numbers, st.just(q), st.just(k), window, chunk)


@st.composite
def dense_problems(draw: st.DrawFn) -> Problem:
    lengths = st.integers(0, MAX_LENGTH)
    batch = draw(st.integers(0, 5))
    return draw(problems(SeqLayout.DENSE, batch, Side(draw(lengths)), Side(draw(lengths))))


@st.composite
def sides(draw: st.DrawFn, batch: int, lengths: st.SearchStrategy[int]) -> Side:
    """Packed or dense, with or without seqused, with runs of equal lengths longer than one and two scans."""
    segments = None
    if draw(st.booleans()):
        segments = []
        while len(segments) < batch:
            segments += [draw(lengths)] * draw(st.sampled_from((1, 1, 2, 5, 33, 70)))
        segments = tuple(segments[:batch])
    used = None
    if draw(st.booleans()):
        pattern = draw(st.lists(st.one_of(st.integers(-2, 5), lengths), min_size=1, max_size=7))
        used = tuple(itertools.islice(itertools.cycle(pattern), batch))
    return Side(draw(lengths), segments, used)


@st.composite
def varlen_problems(draw: st.DrawFn) -> Problem:
    batch = draw(st.one_of(st.sampled_from(BATCHES), st.integers(0, 6)))
    q, k = draw(sides(batch, st.integers(0, MAX_LENGTH))), draw(sides(batch, KEYS))
    if k.segments is not None and draw(st.booleans()):
        # A caller's max_seqlen_k may be far above the longest sequence.
        k = dataclasses.replace(k, seqlen=draw(st.integers(10**6, INT32_MAX)))
    return draw(problems(SeqLayout.VARLEN, batch, q, k))


def varlen_problem(*segments: int, mask: Mask = Mask.CAUSAL, keys: Sequence[int] | None = None) -> Problem:
    """`keys`: of each sequence, if not as many as queries."""
    q, k = (Side(max(lengths, default=0), tuple(lengths)) for lengths in (segments, keys or segments))
    return Problem(mask, SeqLayout.VARLEN, len(segments), 2, 22, 1, 1, 0, q, k)


#: Lengths of many octaves, most of them beyond a window.
LOCAL_PROBLEM = dataclasses.replace(
    varlen_problem(*[1] * 50, mask=Mask.LOCAL, keys=[2 ** (b % 18) for b in range(50)]), window=(5000, 100)
)
TWO_LAUNCHES = [Launch(3, b"\0\1\2\2"), Launch(5)]


@settings(max_examples=800)
@given(dense_problems(), launches)
def test_dense_tiles_are_handed_out_once(problem, launches):
    check_launches(problem, launches)


@settings(max_examples=1200)
@given(varlen_problems(), launches)
@example(varlen_problem(), TWO_LAUNCHES)
@example(varlen_problem(*[0] * 100), TWO_LAUNCHES)
@example(varlen_problem(*[0] * 33, 9, 5), TWO_LAUNCHES)
@example(varlen_problem(*[0] * 65, 9), TWO_LAUNCHES)
@example(varlen_problem(9, *[0] * 70, 5, 17), TWO_LAUNCHES)
@example(varlen_problem(9, 5, *[0] * 70), TWO_LAUNCHES)
@example(varlen_problem(*[0] * 31, 9, 5, *[0] * 31), TWO_LAUNCHES)
@example(varlen_problem(*[1] * 70, keys=[2 ** (b % 18) for b in range(70)]), TWO_LAUNCHES)
@example(LOCAL_PROBLEM, TWO_LAUNCHES)
@example(dataclasses.replace(LOCAL_PROBLEM, attention_chunk=2500), TWO_LAUNCHES)
@example(dataclasses.replace(LOCAL_PROBLEM, window=(-1, 0)), TWO_LAUNCHES)
def test_varlen_tiles_are_handed_out_once(problem, launches):
    """I5: more sequences than one scan covers. L6: nothing behind the index arrays is read (it would be a fault)."""
    check_launches(problem, launches)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mask", Mask)
def test_every_scan_boundary(batch, mask):
    """I5, L6: sequences of different lengths up to the end of each scan."""
    check_launches(varlen_problem(*(1 + b % MAX_LENGTH for b in range(batch)), mask=mask), TWO_LAUNCHES)


@settings(max_examples=300)
@given(st.lists(st.one_of(KEYS, st.integers(1, 2**24)), min_size=33, max_size=100))
@example([1000] * 32 + [131072])
@example([10] * 40 + [2047] * 30 + [2048])
@example([2**17 - 1, 2**17] * 30 + [2**29])
def test_no_sequence_is_left_behind_much_shorter_ones(keys):
    """Of any batch: unless it has less than an eighth of the most keys, or so few that its tiles end soon."""
    handed = launch_grid(varlen_problem(*[1] * len(keys), keys=keys), Launch(1), TileCounter(0, 0), 2 * len(keys))
    shortest_before = max(keys)
    for _, (batch, _, _) in handed:
        is_short = keys[batch] < max(max(keys) / 8, 2 * max(FEW_KEYS, len(keys)))
        assert is_short or keys[batch] < 2 * shortest_before
        shortest_before = min(shortest_before, max(1, keys[batch]))


@settings(max_examples=200)
@given(st.one_of(dense_problems(), varlen_problems()), st.integers(2, 8))
def test_a_late_cta_holds_up_no_more_than_its_first_tile(problem, num_ctas):
    """The first CTA does everything that was not kept for the others, which have not begun yet."""
    tiles = problem.tiles()
    handed = launch_grid(problem, Launch(num_ctas), TileCounter(0, 0), len(tiles) + num_ctas)
    assert len([cta for cta, _ in handed if cta == 0]) >= len(tiles) - (num_ctas - 1)
