"""The planner's table: its file, its classes of lengths, and what it says about a file that is wrong."""

import copy
import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flash_attn_3 import heuristics, tile_table
from flash_attn_3.config import WARPGROUP_ROWS, Dtype, ForwardConfig, Mask, Score, SeqLayout
from flash_attn_3.problem import MAX_SEQLEN, ForwardProblem, MaskSpec
from flash_attn_3.tile_table import TABLE_FILE, ForwardTile, TileChoice, TileKey, TileTable, TileTableError

TABLE = tile_table.read(TABLE_FILE)
CONTENT = json.loads(TABLE_FILE.read_text())

bounds = st.sets(st.integers(1, MAX_SEQLEN), max_size=4).map(sorted)


@st.composite
def tables(draw) -> TileTable:
    """The table of the tree with some keys' lengths cut into classes of other tiles."""
    choices = dict(TABLE.choices)
    for key in draw(st.sets(st.sampled_from(list(choices)), max_size=3)):
        tile = choices[key][-1].tile
        tiles = st.sampled_from([tile, dataclasses.replace(tile, block_n=16), dataclasses.replace(tile, block_n=32)])
        choices[key] = tuple(
            TileChoice(bound, draw(tiles), draw(st.integers(1, 2**40))) for bound in [*draw(bounds), None]
        )
    return TileTable(({"commit": "abc", "tuned": ["d64 full scaled"]},), choices)


def test_a_tile_is_what_the_problem_does_not_decide():
    """A field that ForwardConfig gains is either tunable, and in ForwardTile, or decided by the problem."""
    decided = {field.name for field in dataclasses.fields(TileKey)} | {"dtype", "seq_layout"}
    tunable = [field for field in dataclasses.fields(ForwardConfig) if field.name not in decided]
    assert [(field.name, field.default) for field in tunable] == [
        (field.name, field.default) for field in dataclasses.fields(ForwardTile)
    ]


def test_tile_and_configuration_are_one_to_one():
    for key, (choice, *_) in TABLE.choices.items():
        config = key.config(choice.tile, Dtype.FP16, SeqLayout.VARLEN)
        assert ForwardTile.of(config) == choice.tile
        assert (config.dtype, config.seq_layout) == (Dtype.FP16, SeqLayout.VARLEN)
        assert TileKey(config.head_dim, config.head_dim_v, config.mask, config.score) == key


def test_the_file_is_as_the_tuner_writes_it(tmp_path):
    tile_table.write(TABLE, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == TABLE_FILE.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_every_entry_says_which_run_made_it():
    tuned = [name for run in TABLE.provenance for name in run["tuned"]]
    assert sorted(tuned) == sorted(map(str, TABLE.choices))


@given(tables())
def test_round_trip(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("table") / "table.json"
    tile_table.write(table, path)
    assert tile_table.read(path) == table


@given(tables(), st.data())
def test_each_length_has_the_choice_of_its_class(table, data):
    key = data.draw(st.sampled_from(list(table.choices)))
    edges = [bound for choice in table.choices[key] if (bound := choice.max_seqlen_q) is not None]
    near_edges = [edge + step for edge in edges for step in (-1, 0, 1)]
    seqlen = data.draw(st.sampled_from([0, 1, MAX_SEQLEN, *near_edges]) | st.integers(0, MAX_SEQLEN))
    number = sum(edge < seqlen for edge in edges)
    assert table.choice(key, seqlen) is table.choices[key][number]


@given(tables(), st.data())
def test_the_planner_takes_the_class_of_the_longest_query(table, data):
    """Where there are more tiles than multiprocessors, and more rows in them than one warpgroup's."""
    key = data.draw(st.sampled_from(list(table.choices)))
    longest = [choice.max_seqlen_q or MAX_SEQLEN for choice in table.choices[key]]
    seqlen = data.draw(st.sampled_from(longest) | st.integers(0, MAX_SEQLEN))
    assume(seqlen == 0 or seqlen > WARPGROUP_ROWS)
    problem = ForwardProblem(
        Dtype.BF16, 2, seqlen, 4096, 4, 4, key.head_dim, key.head_dim_v, MaskSpec(key.mask), key.score,
        SeqLayout.DENSE, 4,
    )  # fmt: skip
    choice = table.choice(key, seqlen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heuristics, "forward_tiles", lambda: table)
        assert heuristics.forward_config(problem) == key.config(choice.tile)
        assert heuristics.plan_forward.__wrapped__(problem) == heuristics.plan_choice(problem, choice)
        assert heuristics.forward_config(problem) in heuristics.forward_configs(problem)


def test_the_budget_decides_how_many_heads_share_the_cache():
    key = TileKey(128, 128, Mask.CAUSAL, Score.SCALED)
    problem = ForwardProblem(
        Dtype.BF16, 1, 8192, 8192, 16, 8, 128, 128, MaskSpec(Mask.CAUSAL), Score.SCALED, SeqLayout.DENSE, num_sms=1
    )
    tile = TABLE.choice(key, 8192).tile
    kv_head_bytes = 8192 * (128 + 128) * 2
    sections = {
        budget: heuristics.plan_choice(problem, TileChoice(None, tile, budget)).heads_per_section
        for budget in (1, kv_head_bytes, 3 * kv_head_bytes - 1, 3 * kv_head_bytes, 2**40)
    }
    assert list(sections.values()) == [2, 2, 4, 6, 16]


# -- what is wrong with a file ---------------------------------------------------------------------------------------


def _changed(**changes: object) -> dict:
    """The file's content with these fields of its first entry replaced; ... removes one."""
    content = copy.deepcopy(CONTENT)
    entry = content["entries"][0]
    for name, value in changes.items():
        target = entry if name in entry else entry["tile"]
        target[name] = value
        if value is ...:
            del target[name]
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "diagonal"}, r"entry 0, .*mask=diagonal.*: mask='diagonal' is not supported; it must be full or"),
        ({"score": ...}, r"entry 0, head_dim=64, .*: score is missing"),
        ({"max_seqlen_q": ...}, r"entry 0, .*: max_seqlen_q is missing"),
        ({"max_seqlen_q": "long"}, r"entry 0, .*: max_seqlen_q='long' is not supported; it must be an integer"),
        ({"tile": [1]}, r"entry 0, .*: \[1\] is not supported; it must be an object with block_m, block_n"),
        ({"tile": None}, r"entry 0, .*: None is not supported; it must be an object"),
        ({"tile": {}}, r"entry 0, .*: block_m is missing"),
        ({"block_m": True}, r"entry 0, .*: block_m=True is not supported; it must be an integer"),
        ({"schedule": "eager"}, r"schedule='eager' is not supported; it must be intra_warpgroup or ping_pong or both"),
        ({"block_n": 24}, r"d64 full scaled, max_seqlen_q=None: block_n=24 is not supported"),
        ({"l2_kv_bytes": 0}, r"d64 full scaled, max_seqlen_q=None: l2_kv_bytes=0 is not supported"),
        ({"max_seqlen_q": 512}, r"d64 full scaled: the last entry has max_seqlen_q=512; it must be null"),
        ({"score": "softcap"}, r"there is no entry for d64 full scaled"),
        ({"head_dim": 128, "head_dim_v": 64}, r"there is no entry for d64 full scaled"),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(TileTableError, match=message):
        tile_table.parse_table(_changed(**changes))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([512, 512, None], r"max_seqlen_q=\[512, 512, None\] is not supported; it must rise"),
        ([1024, 512, None], r"must rise"),
        ([0, None], r"max_seqlen_q=0 is not supported; it must be positive"),
        ([None, None], r"before the last has max_seqlen_q=null"),
    ],
)
def test_wrong_classes(bounds, message):
    content = copy.deepcopy(CONTENT)
    first, *others = content["entries"]
    content["entries"] = [*({**first, "max_seqlen_q": bound} for bound in bounds), *others]
    with pytest.raises(TileTableError, match=f"d64 full scaled: .*{message}"):
        tile_table.parse_table(content)


def test_unknown_fields_and_head_dims():
    content = copy.deepcopy(CONTENT)
    content["entries"][0]["tile"]["block_k"] = 64
    with pytest.raises(TileTableError, match=r"entry 0, .*'block_k' is not supported; the fields are block_m, block_n"):
        tile_table.parse_table(content)
    content = copy.deepcopy(CONTENT)
    content["entries"].append({**content["entries"][0], "head_dim": 80})
    with pytest.raises(TileTableError, match=r"d80x64 full scaled: no kernel has these head dims"):
        tile_table.parse_table(content)


@pytest.mark.parametrize(
    "content",
    [[], {}, {"entries": []}, {"provenance": [], "entries": [], "more": 1}, {"provenance": [], "entries": {}}],
)
def test_content_that_is_no_table(content):
    with pytest.raises(TileTableError, match="must be an object with the lists 'provenance' and 'entries'"):
        tile_table.parse_table(content)


@pytest.mark.parametrize("entry", [None, 7, "d64", ["head_dim"], {}])
def test_entries_that_are_none(entry):
    with pytest.raises(TileTableError, match=r"entry 0, .*: (it must be an object|max_seqlen_q is missing)"):
        tile_table.parse_table({"provenance": [], "entries": [entry]})


def test_fields_with_a_default_may_be_absent():
    """Kernels may gain a field; the entries of an older table then have what was fixed before."""
    content = _changed(rescale=...)
    (choice,) = tile_table.parse_table(content).choices[TileKey(64, 64, Mask.FULL, Score.SCALED)]
    assert choice.tile.rescale is next(f.default for f in dataclasses.fields(ForwardTile) if f.name == "rescale")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TileTableError, match=f"{tmp_path}/none.json"):
        tile_table.read(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"provenance": [')
    with pytest.raises(TileTableError, match=f"{tmp_path}/half.json: Expecting"):
        tile_table.read(tmp_path / "half.json")


def test_a_table_that_could_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(TileTableError, match="there is no entry for d64 full scaled"):
        tile_table.write(TileTable((), {}), path)
    assert not path.exists()
