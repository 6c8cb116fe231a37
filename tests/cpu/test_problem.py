"""Mask normalisation against brute force, and the planner over everything that may be asked of it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attn_3 import heuristics
from flash_attn_3.config import Dtype, Mask, Schedule, Score, SeqLayout
from flash_attn_3.heuristics import MAX_TILES, forward_config, head_dim_tiles, plan_choice, plan_forward, tile_key
from flash_attn_3.problem import MAX_SEQLEN, UNLIMITED, ForwardProblem, MaskSpec, Packing, normalize_mask
from flash_attn_3.tile_table import TileTable, forward_tiles
from reference import AttentionOptions, visible_pairs

LENGTHS = st.integers(0, 40)
SIDES = st.one_of(st.just(-1), st.integers(-3, 45))
CHUNKS = st.one_of(st.just(0), st.integers(1, 50))


def before(causal: bool, window: tuple[int, int], chunk: int, len_q: int, len_k: int) -> torch.Tensor:
    options = AttentionOptions(causal=causal, window_size=window, attention_chunk=chunk)
    return visible_pairs(options, range(len_q), len_q, len_k)


def after(spec: MaskSpec, len_q: int, len_k: int) -> torch.Tensor:
    """What a kernel does with a normalised mask: FULL and CAUSAL look at neither window nor chunk."""
    options = {
        Mask.FULL: AttentionOptions(),
        Mask.CAUSAL: AttentionOptions(causal=True),
        Mask.LOCAL: AttentionOptions(
            window_size=(spec.window_left, spec.window_right), attention_chunk=spec.attention_chunk
        ),
    }[spec.mask]
    return visible_pairs(options, range(len_q), len_q, len_k)


@settings(max_examples=2000)
@given(st.booleans(), st.tuples(SIDES, SIDES), CHUNKS, LENGTHS, LENGTHS, st.data())
def test_normalised_mask_shows_the_same_pairs(causal, window, chunk, max_q, max_k, data):
    """W1, W2, W4: for the longest sequences and for every shorter one of a variable-length batch."""
    spec = normalize_mask(causal, window, chunk, max_q, max_k)
    for len_q, len_k in [(max_q, max_k), data.draw(st.tuples(st.integers(0, max_q), st.integers(0, max_k)))]:
        assert torch.equal(after(spec, len_q, len_k), before(causal, window, chunk, len_q, len_k))


@given(st.booleans(), st.tuples(SIDES, SIDES), CHUNKS, LENGTHS, LENGTHS)
def test_normalised_mask_is_the_cheapest(causal, window, chunk, max_q, max_k):
    spec = normalize_mask(causal, window, chunk, max_q, max_k)
    if spec.mask is Mask.FULL:
        assert (spec.window_left, spec.window_right, spec.attention_chunk) == (UNLIMITED, UNLIMITED, 0)
    if chunk == 0 and max_q > 0 and max_k > 0 and before(causal, window, chunk, max_q, max_k).all():
        assert spec.mask is Mask.FULL, "nothing is hidden, so nothing needs masking"
    again = normalize_mask(False, (spec.window_left, spec.window_right), spec.attention_chunk, max_q, max_k)
    assert again == spec


@given(st.tuples(SIDES, SIDES), LENGTHS, LENGTHS)
def test_causal_is_a_right_side_of_zero(window, max_q, max_k):
    left, _ = window
    assert normalize_mask(True, window, 0, max_q, max_k) == normalize_mask(False, (left, 0), 0, max_q, max_k)


# -- the planner -------------------------------------------------------------------------------------------


def allowed_head_dims() -> list[tuple[int, int]]:
    """Every (head_dim, head_dim_v) that the validation lets through."""
    steps = range(8, 257, 8)
    equal = [(d, d) for d in steps]
    wider = [(d, dv) for d in steps if d <= 64 for dv in range(8, 513, 8)]
    narrower = [(d, dv) for d in steps if 128 < d <= 192 for dv in steps if 96 < dv <= 128]
    return sorted({*equal, *wider, *narrower})


@st.composite
def problems(draw) -> ForwardProblem:
    head_dim, head_dim_v = draw(st.sampled_from(allowed_head_dims()))
    heads_kv = draw(st.integers(1, 128))
    heads_q = heads_kv * draw(st.integers(0, 128))
    max_seqlen_q, max_seqlen_k = draw(st.integers(0, MAX_SEQLEN)), draw(st.integers(0, MAX_SEQLEN))
    # A warpgroup's rows are used by half at least, and values take at most two passes.
    tiles_per_sequence = max(1, heads_q * (max_seqlen_q // 32 + 1) * 2)
    window = draw(st.tuples(st.integers(-1, 2**31 - 1), st.integers(-1, 2**31 - 1)))
    chunk = draw(st.one_of(st.just(0), st.integers(1, 2**31 - 1)))
    return ForwardProblem(
        dtype=draw(st.sampled_from(Dtype)),
        batch=draw(st.integers(0, min(100_000, MAX_TILES // tiles_per_sequence))),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=normalize_mask(draw(st.booleans()), window, chunk, max_seqlen_q, max_seqlen_k),
        score=draw(st.sampled_from(Score)),
        seq_layout=draw(st.sampled_from(SeqLayout)),
        num_sms=draw(st.integers(1, 132)),
        packing=draw(st.sampled_from(Packing)),
    )


@settings(max_examples=1000)
@given(problems())
def test_every_problem_has_a_valid_plan(problem):
    plan = plan_forward(problem)
    config = plan.config
    config.validate()
    assert config.dtype is problem.dtype
    assert config.mask is problem.mask.mask
    assert config.score is problem.score
    assert config.seq_layout is problem.seq_layout
    assert config.head_dim >= problem.head_dim
    assert config.head_dim_v * plan.num_value_passes >= problem.head_dim_v
    assert config.head_dim_v * (plan.num_value_passes - 1) < problem.head_dim_v, "no pass may be empty"


def test_too_many_tiles_are_refused():
    """I1: tile numbers are 32 bits wide."""
    problem = ForwardProblem(
        Dtype.BF16, 2**24, 1, 1, 128, 128, 8, 8, MaskSpec(Mask.FULL), Score.SCALED, SeqLayout.DENSE, num_sms=132
    )
    with pytest.raises(ValueError, match=r"2147483648 tiles .* at most 2147418112 are supported"):
        plan_forward(problem)


@given(problems())
def test_launch_shape(problem):
    """I1, I5: however many tiles there are, no more CTAs than multiprocessors, and every number fits in 32 bits."""
    plan = plan_forward(problem)
    nothing_to_do = 0 in (problem.batch, problem.heads_q, problem.max_seqlen_q)
    assert (plan.num_ctas == 0) == nothing_to_do
    assert plan.num_ctas <= problem.num_sms
    units = problem.heads_q * plan.num_value_passes * max(1, problem.batch)
    assert 1 <= plan.heads_per_section <= max(1, units)
    assert plan.heads_per_section < 2**31


@given(problems())
def test_clusters_are_whole(problem):
    """Each works on two query blocks, the last of which may not exist."""
    dims = {"head_dim": 128, "head_dim_v": 128}  # of several column chunks
    problem = dataclasses.replace(problem, mask=MaskSpec(Mask.FULL), num_sms=max(2, problem.num_sms), **dims)
    choice = forward_tiles().choice(tile_key(problem), problem.max_seqlen_q)
    tile = dataclasses.replace(choice.tile, cluster_size=2, block_n=64)
    plan = plan_choice(problem, dataclasses.replace(choice, tile=tile))
    alone = plan_choice(problem, dataclasses.replace(choice, tile=dataclasses.replace(tile, cluster_size=1)))
    assert plan.num_ctas % 2 == 0 and plan.num_ctas <= problem.num_sms
    assert (plan.num_ctas == 0) == (alone.num_ctas == 0)
    # Where they do not fill the GPU, there is one for each pair of blocks.
    assert plan.num_ctas >= min(alone.num_ctas, problem.num_sms // 2 * 2)


@given(problems(), st.integers(1, 132))
def test_plan_depends_on_the_problem_alone(problem, num_sms):
    first = plan_forward(problem)
    plan_forward.cache_clear()
    plan_forward(dataclasses.replace(problem, num_sms=num_sms))
    assert plan_forward(problem) == first
    other = forward_config(dataclasses.replace(problem, num_sms=num_sms))
    rows_alone = {"block_m": 64, "schedule": Schedule.INTRA_WARPGROUP, "cluster_size": 1}
    assert dataclasses.replace(other, **rows_alone) == dataclasses.replace(first.config, **rows_alone), (
        "rows' results must not depend on the number of multiprocessors"
    )


@given(problems())
def test_packed_heads_share_a_key_head(problem):
    packed = plan_forward(problem).packed_heads
    assert packed <= 64
    assert problem.heads_q // problem.heads_kv % packed == 0
    assert packed == 1 or problem.packing is not Packing.NEVER


@pytest.mark.parametrize(
    ("seqlen_q", "group", "packing", "packed"),
    [
        (1, 8, Packing.AUTO, 8),
        (1, 12, Packing.AUTO, 12),
        (1, 7, Packing.AUTO, 7),
        (9, 7, Packing.AUTO, 7),  # 63 of 64 rows
        (1, 71, Packing.AUTO, 1),  # a prime, more than a warpgroup's rows
        (1, 144, Packing.AUTO, 48),
        (1, 126, Packing.AUTO, 63),
        (1, 128, Packing.AUTO, 64),
        (1, 8, Packing.NEVER, 1),
        (100, 8, Packing.AUTO, 8),  # 800 of 896 rows in place of 100 of 128
        (64, 8, Packing.AUTO, 2),  # two heads fill a tile
        (128, 8, Packing.AUTO, 1),
        (128, 8, Packing.ALWAYS, 8),
        (8192, 8, Packing.AUTO, 1),
        (8192, 7, Packing.ALWAYS, 7),
    ],
)
def test_packing(seqlen_q, group, packing, packed):
    problem = ForwardProblem(
        *(Dtype.BF16, 100, seqlen_q, 8192, 2 * group, 2, 128, 128),
        *(MaskSpec(Mask.FULL), Score.SCALED, SeqLayout.DENSE, 132, packing),
    )
    plan = plan_forward(problem)
    assert plan.packed_heads == packed
    assert plan.num_ctas == min(
        132, 100 * 2 * group // packed * math.ceil(seqlen_q / (plan.config.block_m // 64 * (64 // packed)))
    )


@pytest.mark.parametrize(("group", "packed"), [(1, 1), (7, 7), (8, 8), (71, 1), (128, 64)])
@pytest.mark.parametrize("seqlen_q", [1, 8192])
def test_packing_where_the_longest_sequence_says_little(seqlen_q, group, packed):
    """A long prompt in a batch does not leave the others unpacked."""
    problem = ForwardProblem(
        *(Dtype.BF16, 100, seqlen_q, 8192, 2 * group, 2, 128, 128),
        *(MaskSpec(Mask.FULL), Score.SCALED, SeqLayout.VARLEN, 132),
    )
    assert plan_forward(problem).packed_heads == packed
    assert plan_forward(dataclasses.replace(problem, packing=Packing.NEVER)).packed_heads == 1


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize(("seqlen_q", "rows"), [(512, 64), (513, None), (64, 64), (0, None)])
def test_tiles_of_one_warpgroup_where_all_find_a_multiprocessor(head_dim, seqlen_q, rows):
    problem = ForwardProblem(
        *(Dtype.BF16, 1, seqlen_q, 512, 16, 16, head_dim, head_dim),
        *(MaskSpec(Mask.FULL), Score.SCALED, SeqLayout.DENSE, 132),
    )
    plan = plan_forward(problem)
    assert plan.config.block_m == (rows or forward_tiles().choice(tile_key(problem), seqlen_q).tile.block_m)
    assert plan.num_ctas == -(-seqlen_q // plan.config.block_m) * 16


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("seqlen_q", "group", "rows"),
    [
        (64, 1, 64),
        (65, 1, None),
        (1, 8, 64),
        (8, 8, 64),  # a full warpgroup of packed heads
        (9, 8, None),
        (64, 8, None),  # two heads to a tile: their keys are loaded once
    ],
)
@pytest.mark.parametrize("layout", SeqLayout)
def test_tiles_of_one_warpgroup_where_others_would_have_rows_for_one(head_dim, seqlen_q, group, rows, layout):
    """However many there are."""
    problem = ForwardProblem(
        *(Dtype.BF16, 1000, seqlen_q, 8192, 2 * group, 2, head_dim, head_dim),
        *(MaskSpec(Mask.FULL), Score.SCALED, layout, 132),
    )
    table_rows = forward_tiles().choice(tile_key(problem), seqlen_q).tile.block_m
    assert plan_forward(problem).config.block_m == (rows or table_rows)


@given(problems())
def test_tiles_of_one_warpgroup_are_no_more_than_multiprocessors_or_other_tiles(problem):
    """Or their keys would be loaded more often."""
    plan = plan_forward(problem)
    choice = forward_tiles().choice(tile_key(problem), problem.max_seqlen_q)
    if plan.config.block_m == choice.tile.block_m:
        return
    counts = []
    for packed_heads, block_m in [
        (plan.packed_heads, 64),
        (plan_choice(problem, choice).packed_heads, choice.tile.block_m),
    ]:
        m_blocks = math.ceil(problem.max_seqlen_q / (block_m // 64 * (64 // packed_heads)))
        counts.append(m_blocks * problem.batch * (problem.heads_q // packed_heads) * plan.num_value_passes)
    assert 0 < counts[0] <= max(problem.num_sms, counts[1])


@pytest.fixture
def clusters_everywhere(monkeypatch):
    """The tuner may come to choose them for all full masks whose keys and values have several column chunks."""
    table = forward_tiles()
    choices = {
        key: tuple(
            dataclasses.replace(choice, tile=dataclasses.replace(choice.tile, cluster_size=2))
            if key.mask is Mask.FULL and min(key.head_dim, key.head_dim_v) >= 128
            else choice
            for choice in group
        )
        for key, group in table.choices.items()
    }
    clustered = TileTable((), choices)
    clustered.check()
    monkeypatch.setattr(heuristics, "forward_tiles", lambda: clustered)
    plan_forward.cache_clear()
    yield
    plan_forward.cache_clear()


@pytest.mark.parametrize(
    ("seqlen_q", "batch", "num_sms", "layout", "size"),
    [
        (8192, 4, 132, SeqLayout.DENSE, 2),
        (256, 64, 132, SeqLayout.DENSE, 2),
        (8192, 4, 132, SeqLayout.VARLEN, 1),
        (1, 64, 132, SeqLayout.DENSE, 1),
        (128, 64, 132, SeqLayout.DENSE, 1),  # one query block
        (384, 64, 132, SeqLayout.DENSE, 1),  # three, and one without rows
        (31 * 128, 64, 132, SeqLayout.DENSE, 1),
        (33 * 128, 64, 132, SeqLayout.DENSE, 2),
        (8192, 4, 131, SeqLayout.DENSE, 2),
        (8192, 4, 3, SeqLayout.DENSE, 1),
        (8192, 4, 1, SeqLayout.DENSE, 1),
    ],
)
def test_clusters_where_nearly_all_of_their_ctas_have_rows(clusters_everywhere, seqlen_q, batch, num_sms, layout, size):
    problem = ForwardProblem(
        *(Dtype.BF16, batch, seqlen_q, 8192, 32, 32, 128, 128),
        *(MaskSpec(Mask.FULL), Score.SCALED, layout, num_sms),
    )
    plan = plan_forward(problem)
    assert plan.config.cluster_size == size
    assert plan.num_ctas <= num_sms


@given(problem=problems())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_can_be_chosen_is_listed(clusters_everywhere, problem):
    listed = heuristics.forward_configs(problem)
    assert forward_config(problem) in listed
    assert len(listed) == len(set(listed))
    if problem.seq_layout is SeqLayout.VARLEN:
        assert {config.cluster_size for config in listed} == {1}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(512, 512), (2048, 2048), (8192, 8192), (2048, 8192), (8192, 2048)])
def test_the_last_section_lasts_longer_than_its_longest_tile(head_dim, seqlen_q, seqlen_k):
    """Or the launch would end with one long tile, and idle multiprocessors."""
    problem = ForwardProblem(
        *(Dtype.BF16, 64, seqlen_q, seqlen_k, 16, 16, head_dim, head_dim),
        *(MaskSpec(Mask.CAUSAL, UNLIMITED, 0), Score.SCALED, SeqLayout.DENSE, 132),
    )
    plan = plan_forward(problem)
    block_m = plan.config.block_m
    ends = range(block_m, seqlen_q + block_m, block_m)
    visible = [max(0, min(seqlen_k, seqlen_k - seqlen_q + end)) for end in ends]
    assert plan.least_heads_in_last_section * sum(visible) / problem.num_sms >= max(visible)


def test_wide_values_take_two_passes():
    """The 64/512 shape: two column passes of 256."""
    mask = MaskSpec(Mask.FULL)
    problem = ForwardProblem(Dtype.BF16, 1, 128, 128, 1, 1, 64, 512, mask, Score.SCALED, SeqLayout.DENSE, 132)
    plan = plan_forward(problem)
    assert (plan.config.head_dim, plan.config.head_dim_v, plan.num_value_passes) == (64, 256, 2)


def test_every_allowed_head_dim_has_tiles():
    for head_dim, head_dim_v in allowed_head_dims():
        tile, tile_v = head_dim_tiles(head_dim, head_dim_v)
        assert head_dim <= tile and (head_dim_v <= tile_v or tile_v == 256)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(257, 64), (96, 104), (192, 200)])
def test_head_dims_without_tiles(head_dim, head_dim_v):
    with pytest.raises(ValueError, match="is not supported"):
        head_dim_tiles(head_dim, head_dim_v)
