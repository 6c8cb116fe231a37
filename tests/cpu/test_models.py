"""The models behind the log of ideas: they must be able to tell the cases apart that the log tells apart."""

import itertools

from benchmarks.models import accumulate, occupancy, sections
from hypothesis import given
from hypothesis import strategies as st


def test_a_truncating_accumulator_shrinks_with_the_length_and_less_in_two_levels():
    short, long = accumulate(2**14, 2**20)[0], accumulate(2**16, 2**20)[0]
    assert long < short < 1.0
    assert long < accumulate(2**16, 2**14)[0] < 1.0


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 70))
def test_sections_share_out_all_heads(num_heads, heads, least_last):
    found = sections(num_heads, heads, least_last)
    assert list(itertools.chain(*found)) == list(range(num_heads))
    assert all(len(section) == heads for section in found[:-1])
    assert len(found[-1]) >= min(num_heads, max(1, least_last))


def test_a_larger_last_section_ends_a_launch_more_evenly():
    assert occupancy(256, 8192) < occupancy(256, 8192, last=1.5) <= 1.0
