"""Tiles that the planner's table may come to hold: each axis of the tuner's away from its default, in the emulator."""

import pytest
import torch
from tests.gpu.cases import Case
from tests.gpu.harness import make_tensors

import emulation
from emulated_tiles import audit_tile, run_tile
from flash_attn_3.config import Dtype, Mask, OutputBuffer, Rescale, Schedule, Score, SeqLayout
from flash_attn_3.tile_table import ForwardTile, TileKey

DENSE = {"batch": 1, "seqlen_q": 300, "seqlen_k": 450, "heads_q": 2, "heads_kv": 1}
VARLEN = {"lens_q": (300, 0, 1, 200), "lens_k": (130, 5, 0, 300), "heads_q": 2, "heads_kv": 1}
TURNS = {"schedule": Schedule.PING_PONG}
OVER_Q = {"num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q}
#: (the call, what its tile has in the place of the table's)
TILES = [
    (Case(64, **DENSE, causal=True), {"block_m": 64, "schedule": Schedule.INTRA_WARPGROUP}),
    (Case(64, **DENSE), {"block_m": 256, "block_n": 64}),
    (Case(128, **DENSE, causal=True), {"num_q_stages": 1, "rescale": Rescale.LAZY}),
    (Case(128, **VARLEN), {"num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q}),
    (Case(128, **DENSE, window_size=(100, 20)), {"num_q_stages": 1, "output_buffer": OutputBuffer.NONE}),
    (Case(64, **DENSE, causal=True), {"polynomial_exp2_of_16": 4, "num_stages": 3, "block_n": 96}),
    (Case(128, **DENSE), {"cluster_size": 2}),
    (Case(128, **VARLEN), {"cluster_size": 2}),
    (Case(256, **DENSE), {"cluster_size": 2, "block_n": 64}),
    (Case(64, **DENSE, causal=True), {"rescale": Rescale.ON_OVERFLOW, "polynomial_exp2_of_16": 4}),
    (Case(64, **DENSE, window_size=(200, 20), dtype=torch.float16), {"rescale": Rescale.ON_OVERFLOW}),
    (Case(96, **VARLEN, softcap=10.0), {"rescale": Rescale.ON_OVERFLOW, "num_q_stages": 1}),
    (
        Case(128, **VARLEN, causal=True),
        {"rescale": Rescale.ON_OVERFLOW, "num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q},
    ),
    (Case(128, **DENSE), {"rescale": Rescale.ON_OVERFLOW, "cluster_size": 2}),
    (Case(64, **DENSE, causal=True), TURNS | {"block_n": 176, "polynomial_exp2_of_16": 4}),
    (Case(64, **DENSE), TURNS | {"block_m": 256, "block_n": 80, "rescale": Rescale.LAZY}),
    (Case(128, **DENSE, window_size=(100, 20)), TURNS | {"num_q_stages": 1, "output_buffer": OutputBuffer.NONE}),
    (
        Case(128, **VARLEN, causal=True, softcap=10.0),
        TURNS | OVER_Q | {"block_m": 192, "block_n": 112, "rescale": Rescale.LAZY},
    ),
    (Case(128, **VARLEN), TURNS | {"num_q_stages": 1, "cluster_size": 2}),
    (Case(96, **VARLEN, causal=True), TURNS | {"rescale": Rescale.ON_OVERFLOW, "num_stages": 3, "block_n": 96}),
    (Case(256, **DENSE, causal=True, dtype=torch.float16), TURNS),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    # An odd number of multiprocessors: one is left over where two are a cluster.
    machine = emulation.EmulatedMachine(tmp_path_factory.mktemp("emulated_tiles"), num_sms=5)
    yield machine.call
    machine.close()


@pytest.mark.parametrize(
    "case",
    [
        Case(64, **DENSE, causal=True),  # 192 rows otherwise
        Case(128, **DENSE, window_size=(100, 20)),
        Case(256, **VARLEN, causal=True),
    ],
    ids=str,
)
def test_rows_do_not_depend_on_the_height_of_their_tile(machine, case):
    """So that the number of multiprocessors, which decides on the height of few tiles, decides on no result."""
    tensors = make_tensors(case, "cpu")
    out, lse = machine(run_tile, case, tensors, {}, [0])
    low = {"block_m": 64, "schedule": Schedule.INTRA_WARPGROUP}
    found, found_lse = machine(run_tile, case, tensors, low, range(3))
    assert torch.equal(found.nan_to_num(), out.nan_to_num())
    assert torch.equal(found_lse.nan_to_num(), lse.nan_to_num())


@pytest.mark.parametrize(
    "case",
    [Case(64, **DENSE, causal=True), Case(128, **DENSE, window_size=(100, 20)), Case(128, **VARLEN, causal=True)],
    ids=str,
)
def test_rows_do_not_depend_on_the_schedule(machine, case):
    """Products and corrections come in the same order, whatever runs beside them."""
    tensors = make_tensors(case, "cpu")
    out, lse = machine(run_tile, case, tensors, {"schedule": Schedule.BOTH}, [0])
    for other in (Schedule.INTRA_WARPGROUP, Schedule.PING_PONG):
        found, found_lse = machine(run_tile, case, tensors, {"schedule": other}, range(3))
        assert torch.equal(found.nan_to_num(), out.nan_to_num())
        assert torch.equal(found_lse.nan_to_num(), lse.nan_to_num())


@pytest.mark.parametrize(
    ("key", "tile", "dtype", "seq_layout"),
    [
        (TileKey(64, 64, Mask.CAUSAL, Score.SOFTCAP), ForwardTile(128, 96), Dtype.BF16, SeqLayout.VARLEN),
        (TileKey(128, 128, Mask.LOCAL, Score.SCALED), ForwardTile(128, 64), Dtype.FP16, SeqLayout.VARLEN),
        (TileKey(64, 64, Mask.FULL, Score.SCALED), ForwardTile(192, 128), Dtype.FP16, SeqLayout.DENSE),
    ],
    ids=str,
)
def test_right_kernels_pass_the_tuners_audit(machine, key, tile, dtype, seq_layout):
    found = machine(audit_tile, key, tile, dtype, seq_layout)
    assert len(found) == 4 and not any(found.values())


@pytest.mark.parametrize(("case", "changes"), TILES, ids=str)
def test_tile(machine, case, changes):
    machine(run_tile, case, make_tensors(case, "cpu"), changes, range(9))
