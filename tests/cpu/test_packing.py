"""Which position and head a row stands for, where heads are packed: the kernels' header, run on the host."""

import ctypes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import host_headers
from flash_attn_3.config import WARPGROUP_ROWS
from flash_attn_3.problem import MAX_SEQLEN

INT32_MAX = 2**31 - 1


def shim() -> ctypes.CDLL:
    return host_headers.build("packing_shim.cc")


def packing(heads: int, length: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Used rows and warpgroups of a sequence, and (position, head) of each row of a warpgroup."""
    used_rows, warpgroups = ctypes.c_int(), ctypes.c_int()
    positions, row_heads = (ctypes.c_int * WARPGROUP_ROWS)(), (ctypes.c_int * WARPGROUP_ROWS)()
    shim().packing(heads, length, ctypes.byref(used_rows), ctypes.byref(warpgroups), positions, row_heads)
    return used_rows.value, warpgroups.value, list(zip(positions, row_heads, strict=True))


@pytest.mark.parametrize("heads", range(1, WARPGROUP_ROWS + 1))
def test_rows_of_a_warpgroup(heads):
    """Whole positions, head by head as a box of the tensor map has them, as many as there is room for."""
    used_rows, _, rows = packing(heads, 1)
    positions = WARPGROUP_ROWS // heads
    assert rows[:used_rows] == [(position, head) for position in range(positions) for head in range(heads)]
    # Unused rows stand behind the warpgroup's positions, so that a comparison of positions leaves them out.
    assert all(position >= positions for position, _ in rows[used_rows:])


@given(st.integers(1, WARPGROUP_ROWS), st.one_of(st.integers(0, 300), st.integers(0, MAX_SEQLEN)))
@example(1, MAX_SEQLEN)
@example(WARPGROUP_ROWS, MAX_SEQLEN)
def test_warpgroups_hold_a_sequence_and_no_more(heads, length):
    _, warpgroups, _ = packing(heads, length)
    positions = WARPGROUP_ROWS // heads
    assert (warpgroups - 1) * positions < length <= warpgroups * positions or warpgroups == length == 0


@settings(max_examples=3000)
@given(
    st.one_of(st.integers(1, WARPGROUP_ROWS), st.integers(1, INT32_MAX)),
    st.one_of(st.integers(0, 200), st.integers(0, INT32_MAX)),
)
@example(1, INT32_MAX)
@example(63, INT32_MAX)
@example(INT32_MAX, INT32_MAX)
@example(2**30 + 1, INT32_MAX)
def test_division(value, dividend):
    assert shim().divide(dividend, value) == dividend // value
    below_multiple = min(INT32_MAX, dividend // value * value + value - 1)
    assert shim().divide(below_multiple, value) == below_multiple // value
    rounded_up = min(dividend, 2**31 - value)
    assert shim().divide_up(rounded_up, value) == -(-rounded_up // value)
