"""How times become choices: finalists, decisions against the spread, and the table that results."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3 import tile_table
from flash_attn_3.config import Mask, Score
from flash_attn_3.tile_table import TABLE_FILE, ForwardTile, TileChoice, TileKey
from flash_attn_3.tune.choice import Decision, ShapeTimes, decide, ranking
from flash_attn_3.tune.rewrite import merge, updated
from flash_attn_3.tune.shapes import LengthClass, length_classes

MB = 2**20
PRESENT, A, B = (TileChoice(None, ForwardTile(128, block_n), 8 * MB) for block_n in (128, 96, 80))
KEY = TileKey(128, 128, Mask.CAUSAL, Score.SCALED)


def times(present: TileChoice = PRESENT, **rounds: tuple[float, ...]) -> ShapeTimes:
    """`times(p=(1.0, 1.1), a=...)`: milliseconds per round of the present choice and of the challengers."""
    names = {"p": PRESENT, "a": A, "b": B}
    return ShapeTimes(present, {names[name]: list(values) for name, values in rounds.items()})


def test_a_clear_gain_replaces():
    decision = decide([times(p=(1.0, 1.0, 1.0), a=(0.9, 0.91, 0.9)), times(p=(2.0, 2.0, 2.0), a=(1.9, 1.9, 1.9))])
    assert decision.choice == decision.best == A
    assert decision.ratio == pytest.approx(math.sqrt(0.9 * 0.95), rel=5e-3)
    assert 0 < decision.spread < 0.01


def test_a_gain_within_the_spread_does_not():
    decision = decide([times(p=(1.0, 1.0), a=(1.0, 0.97))])
    assert decision.choice is None and decision.best == A
    assert decision.ratio == pytest.approx(0.985, rel=1e-3) and decision.spread == pytest.approx(0.03)
    assert "within the spread" in decision.reason


def test_a_steady_gain_wins_over_a_larger_one_that_may_be_chance():
    decision = decide([times(p=(1.0, 1.0), a=(1.0, 0.9), b=(0.97, 0.97))])
    assert decision.choice == B


def test_clocks_that_change_between_rounds_are_no_spread():
    """Both are 20 % slower in the second round: their ratio is what counts."""
    decision = decide([times(p=(1.0, 1.2), a=(0.97, 1.164))])
    assert decision.choice == A and decision.spread == pytest.approx(0.0, abs=1e-9)


def test_the_mean_over_the_shapes_counts():
    """One shape's winner may lose the class; gains and losses count as factors, whatever the shape's size."""
    small = times(p=(1.0, 1.0), a=(0.7, 0.7), b=(0.9, 0.9))
    large = times(p=(100.0, 100.0), a=(130.0, 130.0), b=(98.0, 98.0))
    decision = decide([small, large])
    assert decision.choice == B and decision.ratio == pytest.approx(math.sqrt(0.9 * 0.98))


def test_ties_keep_the_present_choice():
    decision = decide([times(a=(1.0, 1.0), p=(1.0, 1.0))])
    assert decision.choice is None and decision.best == PRESENT
    assert decision.reason == "the present choice is the fastest"


def test_a_choice_that_was_left_out_as_slow_cannot_win():
    decision = decide([times(p=(1.0, 1.0), a=(0.5,), b=(0.8, 0.8))])
    assert decision.choice == B


def test_a_choice_that_failed_on_one_shape_cannot_win():
    decision = decide([times(p=(1.0, 1.0), a=(0.5, 0.5)), times(p=(1.0, 1.0))])
    assert decision.choice is None and decision.best == PRESENT


def test_a_present_choice_that_failed_is_replaced():
    decision = decide([times(a=(1.0, 1.0), b=(0.9, 0.9))])
    assert decision.choice == B and decision.reason == "the present choice failed"
    assert math.isnan(decision.ratio)


@pytest.mark.parametrize("shapes", [[], [times()], [times(p=(1.0, 1.0)), times()]])
def test_nothing_measured_decides_nothing(shapes):
    decision = decide(shapes)
    assert (decision.choice, decision.best) == (None, None)


def test_shapes_of_a_class_may_have_different_present_choices():
    decision = decide([times(PRESENT, p=(1.0, 1.0), a=(0.9, 0.9)), times(A, p=(1.1, 1.1), a=(1.0, 1.0))])
    assert decision.choice == A and decision.ratio == pytest.approx(math.sqrt(0.9))


@given(
    st.lists(
        st.fixed_dictionaries({name: st.tuples(*[st.floats(0.1, 10.0)] * 3) for name in "pab"}), min_size=1, max_size=4
    )
)
def test_a_replacement_is_always_faster(rounds):
    decision = decide([times(**shape) for shape in rounds])
    assert decision.best is not None
    if decision.choice is not None:
        assert decision.choice != PRESENT and decision.ratio + decision.spread < 1.0


def test_tiles_rank_by_their_mean_over_all_shapes():
    shapes = [times(p=(1.0,), a=(0.9,), b=(1.2,)), times(p=(1.0,), a=(1.5,), b=(0.95,))]
    assert ranking(shapes) == [PRESENT.tile, B.tile, A.tile]
    assert ranking([times(p=(1.0,), a=(0.9,)), times(p=(1.0,))]) == [PRESENT.tile], "wrong on the second shape"
    assert ranking([times()]) == []


def test_challengers_can_be_struck_out():
    shape = times(p=(1.0,), a=(0.9,), b=(1.2,))
    assert shape.without({A.tile, PRESENT.tile}).rounds_ms == {PRESENT: [1.0], B: [1.2]}


# -- the table -------------------------------------------------------------------------------------------------------

CHOICES = st.sampled_from([PRESENT, A, B])


@st.composite
def present_choices(draw) -> tuple[TileChoice, ...]:
    bounds = draw(st.sets(st.integers(1, 40), max_size=4).map(sorted))
    return tuple(dataclasses.replace(draw(CHOICES), max_seqlen_q=bound) for bound in [*bounds, None])


@given(present_choices(), st.sets(st.integers(1, 40), max_size=4), st.data())
def test_merged_choices_hold_for_every_length(present, bounds, data):
    """Brute force over lengths: the decided classes have their choice, all others what they had."""
    decided = [(lengths, data.draw(st.none() | CHOICES)) for lengths in length_classes(sorted(bounds))]
    merged = merge(present, decided)
    table = tile_table.read(TABLE_FILE)
    tile_table.TileTable((), {**table.choices, KEY: merged}).check()
    for seqlen in range(1, 50):
        choice = next(choice for lengths, choice in decided if lengths.holds(seqlen))
        if choice is None:
            choice = next(choice for choice in present if choice.holds(seqlen))
        found = next(choice for choice in merged if choice.holds(seqlen))
        assert (found.tile, found.l2_kv_bytes) == (choice.tile, choice.l2_kv_bytes)
    assert all((a.tile, a.l2_kv_bytes) != (b.tile, b.l2_kv_bytes) for a, b in itertools.pairwise(merged))


RUN = {"commit": "abc", "date": "today", "device": "H200", "versions": {}, "command": "tune"}


def _decision(choice: TileChoice | None, best: TileChoice | None = PRESENT) -> Decision:
    return Decision(choice, best, 1.0, 0.0, "")


def test_a_run_becomes_the_origin_of_what_it_decided():
    table = tile_table.read(TABLE_FILE)
    other = dataclasses.replace(KEY, mask=Mask.FULL)
    short, long = length_classes([1024])
    after = updated(table, KEY, [(short, _decision(A)), (long, _decision(None))], RUN)
    after = updated(after, other, [(short, _decision(None)), (long, _decision(None))], RUN)
    after.check()
    assert after.choices[KEY] == (dataclasses.replace(A, max_seqlen_q=1024), table.choices[KEY][-1])
    assert after.choices[other] == table.choices[other], "measured, and kept"
    assert after.provenance[-1] == {**RUN, "tuned": [str(KEY), str(other)]}
    tuned = [name for run in after.provenance for name in run["tuned"]]
    assert sorted(tuned) == sorted(map(str, after.choices))


def test_a_run_whose_entries_are_all_replaced_is_forgotten():
    table = tile_table.read(TABLE_FILE)
    for name in ("first", "second"):
        for key in table.choices:
            table = updated(table, key, [(LengthClass(0, None), _decision(None))], {**RUN, "commit": name})
    assert [run["commit"] for run in table.provenance] == ["second"]


def test_a_run_that_decided_nothing_changes_nothing():
    table = tile_table.read(TABLE_FILE)
    assert updated(table, KEY, [(LengthClass(0, None), _decision(None, None))], RUN) is table
