"""Rescale.ON_OVERFLOW: blocks tried without their maximum, and tried again with it, warp by warp; in the emulator."""

import pytest
import torch
from tests.gpu.cases import Case
from tests.gpu.harness import make_tensors

import emulation
from emulated_tiles import run_tile
from emulation import SourceChange
from flash_attn_3.config import OutputBuffer, Rescale, Schedule

DENSE = {"batch": 1, "seqlen_q": 300, "seqlen_k": 450, "heads_q": 2, "heads_kv": 1}
ON_OVERFLOW = {"rescale": Rescale.ON_OVERFLOW}
#: (the call, what its tile has beside that in the place of the table's)
TILES = [
    (Case(64, **DENSE), {"block_n": 64}),
    (Case(64, **DENSE, dtype=torch.float16), {"polynomial_exp2_of_16": 4}),
    (Case(96, **DENSE, softcap=30.0), {}),
    (Case(128, **DENSE, causal=True), {"num_q_stages": 1}),
    (Case(128, **DENSE), {"num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q}),
    (Case(128, **DENSE, causal=True), {"schedule": Schedule.PING_PONG, "num_q_stages": 1}),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = emulation.EmulatedMachine(tmp_path_factory.mktemp("emulated_overflow"))
    yield machine.call
    machine.close()


def steep_tensors(case, steepness):
    """Scores that grow as the blocks go by, from the last key to the first."""
    tensors = make_tensors(case, "cpu")
    factors = torch.linspace(steepness, 0.01, case.seqlen_k)
    tensors.k.mul_(factors[:, None, None].to(tensors.k.dtype))
    return tensors


@pytest.mark.parametrize("steepness", [10.0, 100.0, 3000.0])
@pytest.mark.parametrize(("case", "changes"), TILES, ids=str)
def test_scores_that_overflow(machine, case, changes, steepness):
    machine(run_tile, case, steep_tensors(case, steepness), changes | ON_OVERFLOW, range(3))


def test_a_row_whose_first_keys_are_a_whole_block(machine):
    """Row 128 sees nothing of the masked block at the diagonal, so that the block before is its first."""
    case = Case(64, batch=1, seqlen_q=256, seqlen_k=255, heads_q=1, heads_kv=1, causal=True)
    machine(run_tile, case, make_tensors(case, "cpu"), {"block_m": 128, "block_n": 64} | ON_OVERFLOW, range(3))


def test_a_row_of_nan_leaves_the_others_alone(machine):
    """N1's kin: a NaN in one query is the result of its row and of no other."""
    case = Case(64, **DENSE)
    tensors = make_tensors(case, "cpu")
    tensors.q[0, 5, 0] = torch.nan
    machine(run_tile, case, tensors, {"block_n": 64} | ON_OVERFLOW, range(3))


DEFECTS = [
    # A buffer freed by one thread for all warps, though each may still read it.
    SourceChange("core/traits.cuh", "kWarpgroupThreads / kWarpThreads : 1;", "1 : 1;"),
    SourceChange("fwd/mma.cuh", "softmax = before;", ""),
    SourceChange("fwd/mma.cuh", "if (!done) try_again", "if (false) try_again"),
    SourceChange("core/warp_mma.cuh", "b[half], b[half + 2]", "b[2 * half], b[2 * half + 1]"),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.new or defect.old)
def test_a_defect_shows(machine, defect):
    case = Case(64, **DENSE)
    with pytest.raises((AssertionError, RuntimeError)):
        machine(run_tile, case, steep_tensors(case, 100.0), {"block_n": 64} | ON_OVERFLOW, range(18), defect)
