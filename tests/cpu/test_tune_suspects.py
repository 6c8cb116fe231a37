"""Which tiles the tuner spares after others have hung or crashed."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3.config import OutputBuffer, Rescale
from flash_attn_3.tile_table import ForwardTile
from flash_attn_3.tune.suspects import LEAST_DEATHS, Suspects

PRESENT = ForwardTile(128, 128)
LAZY, LAZY_96, LAZY_80 = (ForwardTile(128, block_n, rescale=Rescale.LAZY) for block_n in (128, 96, 80))
#: Axes of few values, so that drawn tiles have some in common.
TILES = st.builds(
    ForwardTile,
    block_m=st.sampled_from([64, 128]),
    block_n=st.sampled_from([64, 80, 96]),
    rescale=st.sampled_from(Rescale),
    output_buffer=st.sampled_from(OutputBuffer),
)


def _suspects(dead: list[ForwardTile], right: list[ForwardTile]) -> Suspects:
    suspects = Suspects()
    for tile in right:
        suspects.was_right(tile)
    for tile in dead:
        suspects.died(tile)
    return suspects


def test_what_two_died_with_is_spared():
    suspects = _suspects([LAZY, LAZY_96], [PRESENT])
    assert suspects.reasons([PRESENT, LAZY_80]) == {
        LAZY_80: "left out: 2 tiles with rescale=lazy hung or crashed, none was right"
    }


def test_one_death_is_no_pattern_however_often_it_is_told():
    assert not _suspects([LAZY, LAZY], [PRESENT]).reasons([LAZY_80, LAZY_96])


def test_one_that_was_right_clears_the_value():
    suspects = _suspects([LAZY, LAZY_96], [PRESENT])
    suspects.was_right(LAZY_80)
    assert not suspects.reasons([dataclasses.replace(LAZY_80, num_q_stages=1)])


def test_one_that_was_right_and_died_later_clears_nothing():
    """It hung when it was timed, say."""
    assert LAZY_80 in _suspects([LAZY, LAZY_96], [PRESENT, LAZY]).reasons([LAZY_80])


@given(st.lists(TILES, max_size=6), st.lists(TILES, max_size=6), st.lists(TILES, max_size=6))
def test_by_definition(dead, right, tiles):
    expected = set()
    for tile in tiles:
        for name in ("block_m", "block_n", "num_stages", "rescale", "output_buffer"):
            died = {other for other in dead if getattr(other, name) == getattr(tile, name)}
            lived = {other for other in right if getattr(other, name) == getattr(tile, name)} - set(dead)
            if len(died) >= LEAST_DEATHS and not lived:
                expected.add(tile)
    assert set(_suspects(dead, right).reasons(tiles)) == expected
