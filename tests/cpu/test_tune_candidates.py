"""Which tiles the tuner considers, and the shapes it measures them on."""

import dataclasses
import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3 import tile_table
from flash_attn_3.config import ConfigError, Mask, Rescale, Schedule, Score
from flash_attn_3.problem import normalize_mask
from flash_attn_3.tile_table import HEAD_DIM_PAIRS, TABLE_FILE, ForwardTile, TileKey
from flash_attn_3.tune import __main__ as command_line
from flash_attn_3.tune.candidates import (
    along_axes,
    candidates,
    default_axes,
    distance,
    feasible_tiles,
    label,
    steps_from,
)
from flash_attn_3.tune.shapes import TuneShape, length_classes

TABLE = tile_table.read(TABLE_FILE)
KEYS = [TileKey(*dims, mask, score) for dims, mask, score in itertools.product(HEAD_DIM_PAIRS, Mask, Score)]
CAUSAL_128 = TileKey(128, 128, Mask.CAUSAL, Score.SCALED)


def test_the_axes_are_all_fields_of_a_tile():
    axes = default_axes()
    assert list(axes) == [field.name for field in dataclasses.fields(ForwardTile)]
    assert set(axes["schedule"]) == set(Schedule) and set(axes["rescale"]) == set(Rescale)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_candidates_are_exactly_what_validates(key):
    """Brute force over all combinations: nothing feasible is left out, nothing else is in."""
    axes = default_axes() | {"block_n": (16, 64, 128, 176, 256)}
    expected = set()
    for values in itertools.product(*axes.values()):
        tile = ForwardTile(*values)
        try:
            key.config(tile).validate()
        except ConfigError:
            continue
        expected.add(tile)
    found = feasible_tiles(key, axes)
    assert set(found) == expected and len(found) == len(expected)
    assert 0 < len(found) < len(list(itertools.product(*axes.values())))


@given(st.sampled_from(KEYS), st.none() | st.integers(1, 600))
def test_candidates_begin_with_the_present_tiles_and_go_outwards(key, limit):
    present = [choice.tile for choice in TABLE.choices[key]]
    found = candidates(key, default_axes(), present, limit)
    assert found[: len(present)] == present
    assert len(set(found)) == len(found)
    nearest = [min(distance(tile, other) for other in present) for tile in found]
    assert nearest == sorted(nearest)
    if limit is not None:
        assert len(found) <= max(limit, len(present))
    else:
        assert set(feasible_tiles(key, default_axes())) <= set(found)


def test_a_present_tile_outside_of_the_axes_is_still_a_candidate():
    odd = ForwardTile(128, 16)
    axes = {name: values[:1] for name, values in default_axes().items()}
    assert candidates(CAUSAL_128, axes, [odd])[0] == odd


FEW_AXES = default_axes() | {"block_n": (64, 96, 128), "num_stages": (2, 3), "polynomial_exp2_of_16": (0, 2)}


@functools.cache
def _few_tiles(key: TileKey) -> list[ForwardTile]:
    return feasible_tiles(key, FEW_AXES)


@given(st.sampled_from(KEYS), st.data())
def test_a_step_along_an_axis_changes_as_little_as_can_be(key, data):
    """Brute force, from any tile that can be built: for each value the nearest of the tiles that have it."""
    tiles = _few_tiles(key)
    tile = data.draw(st.sampled_from(tiles))
    steps = along_axes(tile, tiles, FEW_AXES)
    for name, values in FEW_AXES.items():
        for value in values:
            others = [other for other in tiles if getattr(other, name) == value]
            if value == getattr(tile, name) or not others:
                assert (name, value) not in steps
            else:
                step = steps.pop((name, value))
                assert step in others
                assert distance(tile, step) == min(distance(tile, other) for other in others)
    assert not steps


def test_distance_counts_fields_before_sizes():
    tile = ForwardTile(128, 128)
    near, far = dataclasses.replace(tile, block_n=112), dataclasses.replace(tile, block_n=64)
    two = dataclasses.replace(near, rescale=Rescale.LAZY)
    assert distance(tile, tile) == (0, 0)
    assert distance(tile, near) < distance(tile, far) < distance(tile, two)
    assert distance(near, tile) == distance(tile, near)


def test_labels_are_distinct():
    tiles = feasible_tiles(CAUSAL_128, default_axes())
    assert len({label(tile) for tile in tiles}) == len(tiles)


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("seqlen", [1, 512, 1024, 16384])
def test_shapes_ask_for_the_kernel_of_their_key(key, seqlen):
    shape = TuneShape.of(key, seqlen)
    assert shape.batch * shape.seqlen == 16384
    problem = shape.problem(num_sms=132)
    assert problem.mask.mask is key.mask
    assert (problem.head_dim, problem.head_dim_v, problem.score) == (key.head_dim, key.head_dim_v, key.score)
    assert (shape.softcap > 0) == (key.score is Score.SOFTCAP)
    if key.mask is not Mask.LOCAL or seqlen > 1:
        window = (shape.mask.window_left, shape.mask.window_right)
        assert normalize_mask(key.mask is Mask.CAUSAL, window, 0, seqlen, seqlen).mask in (key.mask, Mask.FULL)
    if key.mask is Mask.LOCAL and seqlen > 1:
        assert 0 < shape.mask.window_left < seqlen - 1, "a local mask has to hide something"


@given(st.lists(st.integers(1, 1000)), st.integers(1, 2000))
def test_each_length_is_in_one_class(bounds, seqlen):
    classes = length_classes(bounds)
    (found,) = [lengths for lengths in classes if lengths.holds(seqlen)]
    assert classes.index(found) == sum(bound < seqlen for bound in set(bounds))


# -- command line ----------------------------------------------------------------------------------------------------


def _dry_run(capsys, *arguments: str) -> list[str]:
    assert command_line.main(["--dry-run", *arguments]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_dry_run_lists_the_chosen_keys(capsys):
    names = _dry_run(capsys, "--head-dim", "128", "--mask", "causal", "full", "--exhaustive")
    expected = [
        key.config(tile).name
        for key in (TileKey(128, 128, Mask.FULL, Score.SCALED), CAUSAL_128)
        for tile in candidates(key, default_axes(), [choice.tile for choice in TABLE.choices[key]])
    ]
    assert names == expected


def test_the_first_stage_is_one_step_along_each_axis(capsys):
    """So that a key needs tens of kernels, not thousands."""
    names = _dry_run(capsys)
    keys = [key for key in KEYS if key.score is Score.SCALED]
    assert names == [
        key.config(tile).name
        for key in keys
        for tile in steps_from(key, default_axes(), [choice.tile for choice in TABLE.choices[key]])
    ]
    assert len(keys) * 10 < len(names) < len(keys) * 40


@pytest.mark.parametrize("key", [CAUSAL_128, TileKey(256, 256, Mask.FULL, Score.SCALED)], ids=str)
def test_steps_have_every_value_that_can_be_had(key):
    present = TABLE.choices[key][-1].tile
    steps, feasible = steps_from(key, default_axes(), [present]), feasible_tiles(key, default_axes())
    assert steps[0] == present and len(set(steps)) == len(steps) and set(steps) <= set(feasible)
    for name in default_axes():
        assert {getattr(tile, name) for tile in steps} == {getattr(tile, name) for tile in feasible}


def test_axes_and_limit_prune(capsys):
    arguments = ["--exhaustive", "--head-dim", "64", "--head-dim-v", "64", "--mask", "full"]
    axes = ["--block-n", "64", "80", "--schedule", "both", "--num-stages", "2"]
    present = {TileKey(64, 64, Mask.FULL, Score.SCALED).config(c.tile).name for c in TABLE.choices[KEYS[0]]}
    pruned = set(_dry_run(capsys, *arguments, *axes)) - present
    assert pruned and all("_both_" in name and ("n64s2" in name or "n80s2" in name) for name in pruned)
    assert len(_dry_run(capsys, *arguments, "--limit", "7")) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rescale", "sometimes"], "rescale='sometimes' is not supported; it must be eager or lazy or on_overflow"),
        (["--block-m", "wide"], "block_m='wide' is not supported; it must be an integer"),
        (["--limit", "9"], "--limit: got 9; it must come with --exhaustive"),
        (["--rounds", "1"], "--rounds: got 1; it must be at least 2"),
        (["--table", "none.json"], "none.json"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert command_line.main(["--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--lengths", "0"], ["--limit", "-1"], ["--turns", "many"], ["--steps", "-1"], ["--mask", "all"]]
)
def test_options_that_are_refused_at_once(arguments, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--dry-run", *arguments])
    assert arguments[0] in capsys.readouterr().err
