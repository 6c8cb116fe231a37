"""The polynomial that computes a share of the softmax's exponentials: the kernels' header, compiled for the host."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import host_headers

#: Promised in csrc/kernels/core/exp2.h.
RELATIVE_ERROR = 3e-6


def exp2(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    result = np.full_like(x, np.nan)
    pointer = ctypes.POINTER(ctypes.c_float)
    host_headers.build("exp2_shim.cc").exp2_polynomial(
        x.ctypes.data_as(pointer), result.ctypes.data_as(pointer), x.size
    )
    return result


def test_error_over_the_whole_range():
    x = np.linspace(-126, 8, 2_000_003, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(exp2(x) / exact - 1).max() <= RELATIVE_ERROR


@given(st.lists(st.floats(-126, 127, width=32), min_size=1, max_size=100))
@settings(deadline=None)
def test_error_anywhere(values):
    x = np.array(values, dtype=np.float32)
    assert np.abs(exp2(x) / np.exp2(x.astype(np.float64)) - 1).max() <= RELATIVE_ERROR


def test_whole_numbers_are_exact():
    x = np.arange(-126, 128, dtype=np.float32)
    assert np.array_equal(exp2(x), np.exp2(x.astype(np.float64)))


@pytest.mark.parametrize("x", [-126.5, -1e4, -1e30, -np.inf])
def test_what_is_too_small_becomes_the_smallest(x):
    assert exp2(np.array([x]))[0] == 2.0**-126


@pytest.mark.parametrize("x", [127.5, 1e4, 1e30, np.inf])
def test_what_is_too_large_becomes_the_largest(x):
    assert exp2(np.array([x]))[0] == 2.0**127


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001])
def test_nan_stays_nan(bits):
    """The first is the one that GPUs make, of whatever other."""
    assert np.isnan(exp2(np.array([bits], dtype=np.uint32).view(np.float32))).all()
