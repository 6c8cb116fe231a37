"""Reading a disassembly: loops, and the way through them that a step usually takes."""

import pytest
from benchmarks import sass

from flash_attn_3 import presets
from flash_attn_3.config import Rescale

#: Two loops in one, the second with a part that is branched over, then a loop without products.
LISTING = """
.L_outer:
  UIADD3 UR4
.L_first:
  HGMMA.64x128x16.F32.BF16 R24
  MUFU.EX2 R2, R3
  FADD R4, R4, R2
  BRA `(.L_first)
.L_second:
  HGMMA.64x128x16.F32.BF16 R24
  BRA `(.L_early)
  MUFU.EX2 R2, R3
.L_early:
  VOTE.ANY P0
  BRA `(.L_done)
  HMMA.16816.F32.BF16 R24
.L_deep:
  HMMA.16816.F32.BF16 R28
  BRA `(.L_deep)
.L_done:
  F2FP.BF16 R2
  BRA `(.L_second)
  BRA `(.L_outer)
.L_wait:
  SYNCS.PHASECHK.TRANS64.TRYWAIT P0
  BRA `(.L_wait)
  EXIT
.L_far_wait:
  SYNCS.PHASECHK.TRANS64.TRYWAIT P0
  BRA `(.L_early)
"""
LINES = [line.strip() for line in LISTING.splitlines() if line]


def test_loops_with_products_that_hold_no_other_one():
    assert [loop[0] for loop in sass.product_loops(LINES)] == [".L_first:", ".L_second:"]


def test_opcodes_come_without_modifiers_and_labels():
    assert sass.opcodes(sass.product_loops(LINES)[0]) == {"HGMMA": 1, "MUFU": 1, "FADD": 1, "BRA": 1}


def test_the_usual_path_leaves_out_the_second_try():
    second = sass.product_loops(LINES)[1]
    assert sass.opcodes(sass.usual_path(second)) == {"HGMMA": 1, "BRA": 3, "MUFU": 1, "VOTE": 1, "F2FP": 1}
    first = sass.product_loops(LINES)[0]
    assert sass.usual_path(first) == first


def test_a_second_try_that_nothing_leads_around_is_refused():
    with pytest.raises(ValueError, match="no branch leads around"):
        sass.usual_path([line for line in LINES if line != "BRA `(.L_done)"])


def test_steps_are_the_loops_with_products_by_length():
    assert [(step["HGMMA"], step.total()) for step in sass.steps(LINES)] == [(1, 4), (1, 7)]


def test_backward_kernels_know_no_way_to_rescale():
    ways = [Rescale.EAGER, Rescale.LAZY]
    forward, backward = (next(c for c in presets.core_configs() if family == c.FAMILY) for family in ("fwd", "bwd"))
    assert [config.rescale for config in sass._with_each(forward, ways)] == ways
    assert sass._with_each(backward, ways) == [backward]
