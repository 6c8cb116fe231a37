"""Warpgroups that need less of the keys than their tile visits: fewer blocks, half of the first; in the emulator."""

import pytest
from tests.gpu.cases import Case
from tests.gpu.harness import make_tensors

import emulation
from emulated_tiles import run_tile
from emulation import SourceChange
from flash_attn_3.config import OutputBuffer, Schedule

DENSE = {"batch": 2, "seqlen_q": 700, "seqlen_k": 700, "heads_q": 2, "heads_kv": 1}
WINDOW = Case(128, **DENSE, window_size=(64, 0))
#: q is loaded behind the first keys of a tile and waits for the output of the tile before.
OVER_Q = {"num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q, "block_n": 48}
#: Turns alone.
TURNS = {"block_n": 48, "schedule": Schedule.PING_PONG}
#: (the call, what its tile has in the place of the table's)
TILES = [
    (Case(64, **DENSE, causal=True), {"block_m": 192}),
    (Case(64, **DENSE, causal=True), {"block_m": 256, "block_n": 64}),
    (Case(96, **DENSE), {"block_m": 192, "block_n": 64, "cluster_size": 2}),  # warpgroups without a row
    (Case(64, **DENSE, window_size=(100, 50)), {"block_m": 192}),
    (Case(256, **DENSE, window_size=(70, 0)), {}),
    (Case(128, **DENSE, attention_chunk=96), {"block_n": 48}),
    (Case(128, lens_q=(300, 1, 0, 200), lens_k=(100, 0, 5, 300), heads_q=2, heads_kv=1, causal=True), {"block_n": 64}),
    (Case(128, batch=2, seqlen_q=40, seqlen_k=300, heads_q=8, heads_kv=1, causal=True), {"block_n": 48}),  # packed
    (Case(128, **DENSE, causal=True), OVER_Q),
    (WINDOW, OVER_Q),
    (WINDOW, {"block_n": 48, "schedule": Schedule.INTRA_WARPGROUP}),
    (WINDOW, TURNS),
    (Case(128, **DENSE, causal=True), OVER_Q | TURNS),
    (Case(64, **DENSE | {"seqlen_k": 708}, causal=True), {"schedule": Schedule.PING_PONG, "block_n": 80}),
    *((Case(64, **DENSE | {"seqlen_k": 700 + more}, causal=True), {"block_n": 80}) for more in (-100, -33, 8, 40, 300)),
    (Case(64, **DENSE | {"seqlen_k": 400}, softcap=5.0), {"block_n": 96}),  # a last block of 16 keys
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = emulation.EmulatedMachine(tmp_path_factory.mktemp("emulated_blocks"))
    yield machine.call
    machine.close()


@pytest.mark.parametrize(("case", "changes"), TILES, ids=str)
def test_tile(machine, case, changes):
    machine(run_tile, case, make_tensors(case, "cpu"), changes, range(6))


#: Beside them: the same without turns.
NO_TURNS = {"block_n": 48, "schedule": Schedule.INTRA_WARPGROUP}
SKIP = "      control_.k.wait_full(k_stage_);\n      turn_.wait();\n      turn_.pass_on();\n"
#: Of the step with turns alone.
TURN = "    turn_.wait();\n    issue_values<kValueKeys>(v_stage);\n"
VALUES = "    issue_values<kValueKeys>(v_stage);\n"
SCORES = "    turn_.pass_on();\n    release_v(v_stage);\n    cute::warpgroup_wait<0>();\n    fence_fragment(scores);\n"
DEFECTS = [
    # A buffer of which nobody knows that it was filled, and one freed while others have yet to see that.
    (NO_TURNS, SourceChange("fwd/mma.cuh", SKIP, "")),
    (NO_TURNS, SourceChange("fwd/mma.cuh", "sync_warpgroup(turn_.warpgroup);", "")),
    # A warpgroup whose turns are fewer than the others'.
    (OVER_Q, SourceChange("fwd/mma.cuh", SKIP, "      control_.k.wait_full(k_stage_);\n")),
    (TURNS, SourceChange("fwd/mma.cuh", SKIP, "      control_.k.wait_full(k_stage_);\n")),
    # Values and probabilities of which nobody knows that they are there, or still needed.
    (TURNS, SourceChange("fwd/mma.cuh", f"    control_.v.wait_full(v_stage);\n{TURN}", TURN)),
    (TURNS, SourceChange("fwd/mma.cuh", f"{VALUES}    cute::warpgroup_wait<0>();\n", VALUES)),
    (TURNS, SourceChange("fwd/mma.cuh", SCORES, SCORES.replace("    cute::warpgroup_wait<0>();\n", ""))),
    (TURNS, SourceChange("fwd/mma.cuh", SCORES, SCORES.replace("    turn_.pass_on();\n", ""))),
    (TURNS, SourceChange("fwd/mma.cuh", SCORES, SCORES.replace("    release_v(v_stage);\n", ""))),
    # Values waited for that come behind q.
    (OVER_Q, SourceChange("fwd/mma.cuh", "Shape::kOverlapsTiles && next.exists() ?", "next.exists() ?")),
    # Blocks left for later than the producer's next announcement.
    (OVER_Q, SourceChange("fwd/mma.cuh", "if (ends_early(tile)) {", "if (false) {")),
]


#: (keys, defect): rows whose keys end 8 after the half of a block; at its half; there, in the only block.
HALF_DEFECTS = [
    (708, SourceChange("fwd/mma.cuh", "+ Shape::kHalfKeys;", "+ Shape::kHalfKeys + 8;")),
    (700, SourceChange("fwd/mma.cuh", "step<BlockKind::kEdge, Shape::kHalfKeys>", "step<BlockKind::kEdge>")),
    (700, SourceChange("fwd/mma.cuh", "needed(tile).begin < 2", "needed(tile).begin < 1")),
]


@pytest.mark.parametrize(("seqlen_k", "defect"), HALF_DEFECTS, ids=range(len(HALF_DEFECTS)))
def test_a_defect_of_half_blocks_shows(machine, seqlen_k, defect):
    case = Case(64, **DENSE | {"seqlen_k": seqlen_k}, causal=True)
    with pytest.raises((AssertionError, RuntimeError)):
        machine(run_tile, case, make_tensors(case, "cpu"), {"block_n": 128}, range(3), defect)


@pytest.mark.parametrize(("changes", "defect"), DEFECTS, ids=range(len(DEFECTS)))
def test_a_defect_shows(machine, changes, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        machine(run_tile, WINDOW, make_tensors(WINDOW, "cpu"), changes, range(18), defect)
