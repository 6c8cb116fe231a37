"""The emulator itself: it must see what goes wrong. Each test plants one defect into a kernel that is right without."""

import dataclasses

import pytest
import torch
from tests.gpu.cases import Case
from tests.gpu.harness import check, make_tensors

import emulation
from emulation import SourceChange
from flash_attn_3.heuristics import plan_forward
from flash_attn_3.launch import cuda_forward

CASE = Case(64, batch=1, seqlen_q=400, seqlen_k=500, heads_q=2, heads_kv=1, causal=True)
EAGER, LAZY, MIXED = range(3)
#: The asynchronous units as late as they can be, in all orders of who is last.
ALL_LAZY = range(LAZY, 18, 3)
RIGHT, WRONG = "right", "wrong"
EARLY = "accumulators used before their product was waited for"


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = emulation.EmulatedMachine(tmp_path_factory.mktemp("emulator"))
    yield machine.call
    machine.close()


def outcomes(machine, change, seeds, case=CASE):
    return {machine(outcome, change, seed, case) for seed in seeds}


def outcome(emulator, change, seed, case=CASE):
    """RIGHT, WRONG or the machine's complaint."""
    tensors = make_tensors(case, "cpu")
    problem = dataclasses.replace(case.problem(), num_sms=emulator.num_sms)
    plan = plan_forward(problem)
    out = torch.full((*tensors.q.shape[:-1], case.dv), torch.nan, dtype=case.dtype)
    lse = torch.full((case.batch, case.heads_q, case.seqlen_q), torch.nan)
    launch = cuda_forward(emulator.kernel(plan.config, change), problem, plan, case.scale, case.softcap)
    emulator.seed(seed)
    try:
        launch(tensors.q, tensors.k, tensors.v, out, lse, None, None, None, None, None)
        check(case, tensors, out, lse)
    except RuntimeError as error:
        return str(error)
    except AssertionError:
        return WRONG
    return RIGHT


@pytest.mark.parametrize("seed", range(18))
def test_nothing_is_wrong_without_a_defect(machine, seed):
    assert machine(outcome, None, seed) == RIGHT


def test_a_launch_repeats_exactly(machine):
    change = SourceChange("fwd/mma.cuh", "control_.v.wait_full(v_stage);", "")
    assert machine(outcome, change, MIXED) == machine(outcome, change, MIXED)


@pytest.mark.parametrize("wait", ["control_.k.wait_full(k_stage_);", "control_.v.wait_full(v_stage);"])
def test_keys_used_before_they_have_come(machine, wait):
    change = SourceChange("fwd/mma.cuh", wait, "")
    assert outcomes(machine, change, ALL_LAZY) != {RIGHT}


def test_a_buffer_that_is_freed_while_products_read_it(machine):
    waits = "cute::warpgroup_wait<0>();\n    fence_fragment(out);\n    fence_fragment(p_);"
    assert EARLY in machine(outcome, SourceChange("fwd/mma.cuh", waits, ""), LAZY)


def test_scores_read_before_their_product_is_done(machine):
    change = SourceChange("fwd/mma.cuh", "cute::warpgroup_wait<1>();", "")
    assert EARLY in machine(outcome, change, LAZY)


#: Accesses that nothing orders, which need not show in the results: by products, and by ordinary instructions.
UNORDERED = [
    SourceChange("fwd/mma.cuh", "control_.k.wait_full(k_stage_);", ""),
    SourceChange("fwd/mma.cuh", "control_.v.wait_full(v_stage);", ""),
    SourceChange("fwd/kernel.cuh", "    control.tiles.wait_full(next);\n", ""),
]


@pytest.mark.parametrize("seed", [EAGER, LAZY, MIXED])
@pytest.mark.parametrize("change", UNORDERED, ids=range(len(UNORDERED)))
def test_an_access_that_nothing_orders_shows_whoever_is_late(machine, change, seed):
    assert "not ordered after" in machine(outcome, change, seed)


def test_a_buffer_that_is_never_freed(machine):
    change = SourceChange("fwd/mma.cuh", "if (releases()) control_.k.release(k_stage_);", "")
    complaint = machine(outcome, change, MIXED)
    assert "nobody can go on" in complaint and "waits for an mbarrier" in complaint


def test_stores_that_the_copy_engine_may_not_see(machine):
    change = SourceChange("fwd/epilogue.cuh", "cutlass::arch::fence_view_async_shared();", "")
    assert "without a fence of proxies" in machine(outcome, change, MIXED)


def test_an_output_buffer_that_is_written_while_it_is_copied(machine):
    change = SourceChange("fwd/epilogue.cuh", "wait_buffer_free();\n    write_fragment", "write_fragment")
    assert outcomes(machine, change, ALL_LAZY) != {RIGHT}


def test_a_box_with_nothing_in_bounds(machine):
    change = SourceChange("fwd/load.cuh", "if (row >= sequence.length) {", "if (false) {")
    assert "without an element in bounds" in machine(
        outcome, change, MIXED, CASE.replace(seqlen_q=100, heads_kv=2, batch=2)
    )


def test_shared_memory_beyond_the_launch(machine):
    change = SourceChange("fwd/smem.cuh", "return o[warpgroup];", "return o[warpgroup + 4];")
    assert "outside of the CTA's" in machine(outcome, change, MIXED)


def test_registers_that_the_launch_does_not_have(machine):
    change = SourceChange(
        "fwd/kernel.cuh", "warpgroup_reg_alloc<Shape::kConsumerRegisters>", "warpgroup_reg_alloc<248>"
    )
    assert "waits for registers" in machine(outcome, change, MIXED)


def test_a_wrong_swizzle(machine):
    change = SourceChange("core/wgmma.cuh", "kSwizzleBytes == 128 ? 1 : 2", "kSwizzleBytes == 128 ? 2 : 1")
    assert "not ordered after" in machine(outcome, change, MIXED)
