"""Block ranges against brute force: the Python model, and the kernels' header compiled for the host."""

import ctypes
from collections.abc import Callable

from hypothesis import example, given, settings
from hypothesis import strategies as st

import host_headers
from flash_attn_3.block_range import BlockRange, block_range, key_rows, query_block_range, row_keys
from flash_attn_3.config import Mask
from flash_attn_3.problem import UNLIMITED, MaskSpec, normalize_mask

#: Tiles for which tests/block_range_shim.cc instantiates the header; small ones, so that short sequences have many
#: blocks.
COMPILED_TILES = ((4, 3), (8, 16), (64, 80), (128, 176), (192, 128))

BlockRangeFunction = Callable[[MaskSpec, int, int, int, int, int], BlockRange]


def mask_specs(limit: int) -> st.SearchStrategy[MaskSpec]:
    """All three masks; windows and chunks up to ``limit`` keys."""
    side = st.one_of(st.just(UNLIMITED), st.integers(0, limit))
    chunk = st.one_of(st.just(0), st.integers(1, limit))
    return st.one_of(
        st.just(MaskSpec(Mask.FULL)),
        st.just(MaskSpec(Mask.CAUSAL, UNLIMITED, 0)),
        st.builds(MaskSpec, st.just(Mask.LOCAL), side, side, chunk),
    )


@st.composite
def tiles(draw: st.DrawFn, tile_sizes: st.SearchStrategy[tuple[int, int]], max_len: int) -> tuple:
    """Arguments of a block-range function: (mask, m_block, block_m, block_n, len_q, len_k)."""
    block_m, block_n = draw(tile_sizes)
    len_q = draw(st.integers(1, max_len))
    len_k = draw(st.integers(0, max_len))
    m_block = draw(st.integers(0, (len_q - 1) // block_m))
    return draw(mask_specs(max_len + 10)), m_block, block_m, block_n, len_q, len_k


def sees(mask: MaskSpec, row: int, key: int, len_q: int, len_k: int) -> bool:
    """One pair, straight from the definition of `MaskSpec`."""
    position = row + len_k - len_q
    return (
        (mask.window_left == UNLIMITED or key >= position - mask.window_left)
        and (mask.window_right == UNLIMITED or key <= position + mask.window_right)
        and (mask.attention_chunk == 0 or key // mask.attention_chunk == position // mask.attention_chunk)
    )


def check_against_brute_force(function: BlockRangeFunction, tile: tuple) -> None:
    mask, m_block, block_m, block_n, len_q, len_k = tile
    blocks = function(*tile)
    assert 0 <= blocks.begin <= blocks.full_begin <= blocks.full_end <= blocks.end <= -(-len_k // block_n)
    rows = range(m_block * block_m, min((m_block + 1) * block_m, len_q))
    for n_block in range(-(-len_k // block_n)):
        keys = range(n_block * block_n, (n_block + 1) * block_n)
        visible = [key < len_k and sees(mask, row, key, len_q, len_k) for row in rows for key in keys]
        # Exact in both directions: no needed block is missed, no block is visited or masked for nothing.
        assert any(visible) == (blocks.begin <= n_block < blocks.end), n_block
        assert all(visible) == blocks.is_full(n_block), n_block


@settings(max_examples=2500)
@given(tiles(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_len=40))
@example((MaskSpec(Mask.CAUSAL, UNLIMITED, 0), 0, 4, 4, 9, 3))  # W5: leading rows without a key
@example((MaskSpec(Mask.LOCAL, 3, 2, 0), 0, 4, 4, 12, 5))  # W1: more queries than keys, right window
@example((MaskSpec(Mask.LOCAL, 100, 100, 0), 1, 4, 4, 7, 9))  # W2: windows beyond the sequence
@example((MaskSpec(Mask.LOCAL, UNLIMITED, UNLIMITED, 4), 0, 4, 3, 11, 6))  # chunks at negative positions
@example((MaskSpec(Mask.FULL), 0, 4, 4, 1, 0))  # N5: no keys
def test_model_matches_brute_force(tile):
    check_against_brute_force(block_range, tile)


@settings(max_examples=1000)
@given(mask_specs(30), st.integers(1, 30), st.integers(0, 30))
def test_row_keys_match_brute_force_and_grow_with_the_row(mask, len_q, len_k):
    previous = range(0, 0)
    for row in range(len_q):
        keys = row_keys(mask, row, len_q, len_k)
        assert list(keys) == [key for key in range(len_k) if sees(mask, row, key, len_q, len_k)]
        assert keys.start >= previous.start and keys.stop >= previous.stop
        previous = keys


@settings(max_examples=1000)
@given(
    st.booleans(),
    st.tuples(st.integers(-2, 25), st.integers(-2, 25)),
    st.integers(0, 20),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_normalising_a_mask_keeps_what_is_visible(causal, window_size, chunk, max_lens, shorter_by):
    """Also for sequences shorter than the longest one, whose lengths the normalisation does not know (W1, W2)."""
    mask = normalize_mask(causal, window_size, chunk, *max_lens)
    left, right = window_size
    asked = MaskSpec(Mask.LOCAL, max(left, UNLIMITED), 0 if causal else max(right, UNLIMITED), chunk)
    len_q, len_k = (max(0, length - less) for length, less in zip(max_lens, shorter_by, strict=True))
    for row in range(len_q):
        assert row_keys(mask, row, len_q, len_k) == row_keys(asked, row, len_q, len_k)


def test_window_that_misses_the_first_blocks_is_cut_on_both_sides():
    """W4: the first query tile of a window over a longer key sequence."""
    mask = MaskSpec(Mask.LOCAL, 333, 0, 0)
    assert block_range(mask, 0, 128, 128, 300, 4096) == BlockRange(27, 29, 29, 31)


# -- query blocks of a block of keys -----------------------------------------------------------------------------


def check_query_blocks_against_brute_force(function: BlockRangeFunction, tile: tuple) -> None:
    """``tile`` with the sides exchanged: there is a key, but perhaps no row."""
    mask, n_block, block_n, block_m, len_k, len_q = tile
    blocks = function(mask, n_block, block_m, block_n, len_q, len_k)
    num_m_blocks = -(-len_q // block_m)
    assert 0 <= blocks.begin <= blocks.full_begin <= blocks.full_end <= blocks.end <= num_m_blocks
    keys = range(n_block * block_n, (n_block + 1) * block_n)
    for m_block in range(num_m_blocks):
        rows = range(m_block * block_m, min((m_block + 1) * block_m, len_q))
        visible = [key < len_k and sees(mask, row, key, len_q, len_k) for row in rows for key in keys]
        assert any(visible) == (blocks.begin <= m_block < blocks.end), m_block
        assert all(visible) == blocks.is_full(m_block), m_block


@settings(max_examples=2500)
@given(tiles(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_len=40))
@example((MaskSpec(Mask.CAUSAL, UNLIMITED, 0), 0, 4, 4, 3, 9))  # every row sees the leading keys
@example((MaskSpec(Mask.LOCAL, 3, 2, 0), 0, 4, 4, 5, 12))  # W1: keys left of every window
@example((MaskSpec(Mask.LOCAL, UNLIMITED, UNLIMITED, 4), 0, 3, 4, 6, 11))  # chunks before the first row
@example((MaskSpec(Mask.FULL), 0, 4, 4, 6, 3))  # N3: no query block is full beside keys that do not exist
def test_query_blocks_match_brute_force(tile):
    check_query_blocks_against_brute_force(query_block_range, tile)


@settings(max_examples=1000)
@given(mask_specs(30), st.integers(0, 30), st.integers(1, 30))
def test_key_rows_match_brute_force_and_grow_with_the_key(mask, len_q, len_k):
    previous = range(0, 0)
    for key in range(len_k):
        rows = key_rows(mask, key, len_q, len_k)
        assert list(rows) == [row for row in range(len_q) if sees(mask, row, key, len_q, len_k)]
        assert rows.start >= previous.start and rows.stop >= previous.stop
        previous = rows


# -- the kernels' header ---------------------------------------------------------------------------------------


def header_block_range(mask: MaskSpec, m_block: int, block_m: int, block_n: int, len_q: int, len_k: int) -> BlockRange:
    """``core/block_range.h`` compiled for the host, called like the model."""
    window = (mask.window_left, mask.window_right, mask.attention_chunk)
    arguments = (m_block, len_q, len_k, *window, block_m)
    blocks = (ctypes.c_int * 4)()  # begin, full_begin, full_end, end
    host_headers.build("block_range_shim.cc").block_range(
        list(Mask).index(mask.mask),
        COMPILED_BLOCKS.index(block_n),
        (ctypes.c_int * len(arguments))(*arguments),
        blocks,
    )
    return BlockRange(*blocks)


#: Keys of a block. Its queries are any number: with packed heads a tile has few positions.
COMPILED_BLOCKS = [block_n for _, block_n in COMPILED_TILES]


@settings(max_examples=5000)
@given(tile=tiles(st.tuples(st.integers(1, 9), st.sampled_from(COMPILED_BLOCKS[:2])), max_len=40))
def test_header_matches_brute_force(tile):
    check_against_brute_force(header_block_range, tile)


@settings(max_examples=2500)
@given(tile=tiles(st.tuples(st.integers(1, 256), st.sampled_from(COMPILED_BLOCKS)), max_len=3000))
def test_header_matches_model_on_long_sequences(tile):
    assert header_block_range(*tile) == block_range(*tile)


#: (block_n, block_m), for `tiles` with the sides exchanged.
EXCHANGED_TILES = [(block_n, block_m) for block_m, block_n in COMPILED_TILES]


def header_query_block_range(
    mask: MaskSpec, n_block: int, block_m: int, block_n: int, len_q: int, len_k: int
) -> BlockRange:
    """The header's query blocks, called like the model."""
    arguments = (n_block, len_q, len_k, mask.window_left, mask.window_right, mask.attention_chunk)
    blocks = (ctypes.c_int * 4)()
    host_headers.build("block_range_shim.cc").query_block_range(
        list(Mask).index(mask.mask),
        COMPILED_TILES.index((block_m, block_n)),
        (ctypes.c_int * len(arguments))(*arguments),
        blocks,
    )
    return BlockRange(*blocks)


@settings(max_examples=1500)
@given(tile=tiles(st.sampled_from(EXCHANGED_TILES[:2]), max_len=40))
@example((MaskSpec(Mask.LOCAL, 3, 2, 0), 0, 3, 4, 5, 12))  # W1: keys left of every window
@example((MaskSpec(Mask.FULL), 0, 3, 4, 2, 6))  # N3: no query block is full beside keys that do not exist
@example((MaskSpec(Mask.FULL), 0, 3, 4, 3, 0))  # N9: keys without queries
def test_query_blocks_of_the_header_match_brute_force(tile):
    check_query_blocks_against_brute_force(header_query_block_range, tile)


@settings(max_examples=1500)
@given(tile=tiles(st.sampled_from(EXCHANGED_TILES), max_len=3000))
def test_query_blocks_of_the_header_match_the_model_on_long_sequences(tile):
    mask, n_block, block_n, block_m, len_k, len_q = tile
    arguments = (mask, n_block, block_m, block_n, len_q, len_k)
    assert header_query_block_range(*arguments) == query_block_range(*arguments)


@settings(max_examples=500)
@given(mask_specs(30), st.integers(0, 30), st.integers(1, 30))
def test_rows_of_the_header_match_the_model(mask, len_q, len_k):
    """The backward kernels mask by them."""
    for key in range(len_k):
        arguments = (key, len_q, len_k, mask.window_left, mask.window_right, mask.attention_chunk)
        found = (ctypes.c_int * 2)()
        host_headers.build("block_range_shim.cc").key_rows(
            list(Mask).index(mask.mask), (ctypes.c_int * len(arguments))(*arguments), found
        )
        assert list(range(*found)) == list(key_rows(mask, key, len_q, len_k))


@settings(max_examples=500)
@given(tile=tiles(st.sampled_from(EXCHANGED_TILES[:2]), max_len=60))
def test_turns_are_taken_without_a_gap(tile):
    """R3: the blocks of keys that visit a query block are those that it counts, so that ordered additions never wait
    for one that does not come."""
    mask, _, block_n, block_m, len_k, len_q = tile
    visits = {m_block: [] for m_block in range(-(-len_q // block_m))}
    for n_block in range(-(-len_k // block_n)):
        blocks = header_query_block_range(mask, n_block, block_m, block_n, len_q, len_k)
        for m_block in range(blocks.begin, blocks.end):
            visits[m_block].append(n_block)
    for m_block, visitors in visits.items():
        first = header_block_range(mask, m_block, block_m, block_n, len_q, len_k).begin
        assert [n_block - first for n_block in visitors] == list(range(len(visitors)))
