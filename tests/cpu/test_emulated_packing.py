"""Heads that lie in one tile together, any number of them, in the emulator."""

import dataclasses

import pytest
import torch
from tests.gpu.cases import CAUSAL, FULL, Case, MaskOptions
from tests.gpu.harness import make_tensors

import emulation
from emulated_tiles import run_tile
from flash_attn_3.config import OutputBuffer, Rescale

WINDOW = MaskOptions("window", window_size=(70, 9))
BUFFERS = {
    OutputBuffer.OWN: {},
    OutputBuffer.WITH_Q: {"num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q},
    OutputBuffer.NONE: {"num_q_stages": 1, "output_buffer": OutputBuffer.NONE},
}
RATIOS = (2, 3, 5, 6, 7, 8, 12, 63, 71)
#: One row, a tile's and its neighbours where 7 heads are packed, a warpgroup's, and several tiles.
LENGTHS = (1, 9, 10, 64, 65, 300)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = emulation.EmulatedMachine(tmp_path_factory.mktemp("emulated_packing"))
    yield machine.call
    machine.close()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=str)
@pytest.mark.parametrize("buffer", OutputBuffer, ids=lambda buffer: buffer.slug)
def test_packed_heads(machine, buffer, mask, ratio):
    heads = {"heads_q": 2 * ratio, "heads_kv": 2} if ratio < 12 else {"heads_q": ratio, "heads_kv": 1}
    # Sequences of all lengths, the longest of which do not keep the others from being packed; and one length alone.
    lengths = LENGTHS if ratio < 12 else LENGTHS[:4]
    varlen = Case(64, lens_q=lengths, lens_k=tuple(n + 50 for n in lengths), **heads, **mask.options)
    dense = Case(64, batch=1, seqlen_q=lengths[ratio % len(lengths)], seqlen_k=90, **heads, **mask.options)
    for case in (varlen, dense):
        machine(run_tile, case, make_tensors(case, "cpu"), BUFFERS[buffer] | {"block_m": 128}, range(2))


@pytest.mark.parametrize("changes", [{}, BUFFERS[OutputBuffer.WITH_Q]], ids=["own", "with_q"])
def test_unused_rows_decide_on_nothing(machine, changes):
    """What lies in them could have the other rows of their warp computed in another way. The same bits."""
    case = Case(64, batch=1, seqlen_q=40, seqlen_k=640, heads_q=7, heads_kv=1)
    changes = {"rescale": Rescale.ON_OVERFLOW, "polynomial_exp2_of_16": 4, "block_m": 128, **changes}
    tensors = make_tensors(case, "cpu")
    # The keys that come after the last ones: scores that a second computation would take as the reference of further
    # ones, since they exceed it by more than 8 in the exponent, but do not overflow.
    tensors.q *= 0.1
    tensors.q[..., 0] = 1
    tensors.k[:, :512, :, 0], tensors.k[:, 512:, :, 0] = 46, 0
    alone = dataclasses.replace(case, heads_kv=7)
    shared = dataclasses.replace(tensors, k=tensors.k.expand(-1, -1, 7, -1), v=tensors.v.expand(-1, -1, 7, -1))
    out, lse = machine(run_tile, case, tensors, changes, range(2))
    expected_out, expected_lse = machine(run_tile, alone, shared, changes, range(1))
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
