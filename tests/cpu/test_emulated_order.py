"""In which order gradients are added up, in the emulator: tiles in several sections, adders, and turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from tests.gpu.cases import GradientCase
from tests.gpu.sanitizer_gradients import run_case

import emulation
from emulation import Emulator, SourceChange
from flash_attn_3 import backward_launch, compiler
from flash_attn_3.backward_config import DqPath
from flash_attn_3.backward_plan import BackwardPlan, BackwardProblem, plan_backward
from flash_attn_3.config import KernelConfig

DENSE = {"batch": 2, "seqlen_q": 200, "seqlen_k": 400, "heads_q": 4, "heads_kv": 2}
VARLEN = {"lens_q": (70, 0, 300), "lens_k": (200, 5, 130), "heads_q": 2, "heads_kv": 2}
CASES = [
    GradientCase(64, **DENSE, causal=True),
    GradientCase(128, **DENSE),
    GradientCase(128, **VARLEN, causal=True),
    GradientCase(64, **DENSE, causal=True, deterministic=True),
    GradientCase(128, **VARLEN, window_size=(50, 20), deterministic=True),
    GradientCase(256, **DENSE, causal=True, deterministic=True),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    # So many that some wait for others, two of them being a cluster.
    machine = emulation.EmulatedMachine(tmp_path_factory.mktemp("emulated_order"), num_sms=6)
    yield machine.call
    machine.close()


def differentiate(
    emulator: Emulator,
    case: GradientCase,
    seeds: Iterable[int],
    sections: tuple[int, int] | None = None,
    defect: SourceChange | None = None,
    dq_path: DqPath | None = None,
) -> list[tuple[torch.Tensor, ...]]:
    """Gradients, checked, of each seed. `sections`: heads in one, and in the last one at least."""

    def plan(problem: BackwardProblem) -> BackwardPlan:
        planned = plan_backward(problem)
        if dq_path is not None:
            planned = dataclasses.replace(planned, config=dataclasses.replace(planned.config, dq_path=dq_path))
        if sections is None:
            return planned
        heads, least_last = sections
        return dataclasses.replace(planned, heads_per_section=heads, least_heads_in_last_section=least_last)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_launch, "plan_backward", plan)
        patch.setattr(compiler, "get_kernel", lambda config: emulator.kernel(config, defect_of(config, defect)))
        for seed in seeds:
            emulator.seed(seed)
            found.append(run_case(case, "cpu"))
    return found


def defect_of(config: KernelConfig, defect: SourceChange | None) -> SourceChange | None:
    """Forward kernels stay right."""
    return defect if config.FAMILY == "bwd" else None


@pytest.mark.parametrize("sections", [(1, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sections(machine, case, sections):
    """R3: whatever is worked on together, the order of additions is the same."""
    found = machine(differentiate, case, [1, 2], sections)
    (expected,) = machine(differentiate, case, [0])
    for gradients in found:
        same = slice(0 if case.deterministic else 1, None)  # dk and dv have one writer
        assert all(torch.equal(x, y) for x, y in zip(expected[same], gradients[same], strict=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["unordered", "ordered"])
@pytest.mark.parametrize("case", [GradientCase(64, **DENSE, causal=True), GradientCase(128, **VARLEN)], ids=str)
def test_dq_straight_from_registers(machine, case, deterministic):
    """Also where shared memory has room for it, where the planner would have it go that way."""
    case = dataclasses.replace(case, deterministic=deterministic)
    machine(differentiate, case, [0, 1, 2], None, None, DqPath.DIRECT)


PLAIN = CASES[0]
#: Long sums, rounded so little that another order shows; by way of shared memory, and straight from registers.
STAGED = GradientCase(
    64, dtype=torch.float16, batch=1, seqlen_q=300, seqlen_k=900, heads_q=4, heads_kv=2, deterministic=True
)
DIRECT = GradientCase(
    256, dtype=torch.float16, batch=1, seqlen_q=130, seqlen_k=900, heads_q=1, heads_kv=1, deterministic=True
)
#: Rows without keys, and keys without rows: tiles for which nothing is loaded.
UNSEEN = GradientCase(64, lens_q=(70, 0, 0, 0, 90), lens_k=(300,) * 5, heads_q=2, heads_kv=2)
KEYLESS = GradientCase(64, lens_q=(70, 130), lens_k=(0, 130), heads_q=1, heads_kv=1, deterministic=True)
#: A cluster, whose second CTA has no keys of a head's last block; one that passes over many blocks without keys.
PAIRED = GradientCase(256, **DENSE, causal=True)
PASSED_OVER = GradientCase(256, batch=5, seqlen_q=70, seqlen_k=900, used_k=(900, 5, 5, 5, 130), heads_q=2)
DEFECTS = [
    # The buffer of dq: used before it is free, freed before it is read, taken before it is full, never freed.
    (PLAIN, SourceChange("bwd/write_dq.cuh", "    ring_.wait_empty(block.slice<Traits>(kFirst == 0 ? 0 : 1));\n", "")),
    (PLAIN, SourceChange("bwd/adder.cuh", "    cute::tma_store_wait<0>();\n", "")),
    (PLAIN, SourceChange("bwd/adder.cuh", "    ring_.wait_full(at);\n    float*", "    float*")),
    (PLAIN, SourceChange("bwd/adder.cuh", "    cute::tma_store_wait<0>();\n    ring_.release(at);\n", "")),
    # Taken before all warps have written.
    (PLAIN, SourceChange("bwd/kernel.cuh", "dq.init(kWarpgroupThreads / kWarpThreads, 1)", "dq.init(2, 1)")),
    # A turn that nobody waits for, is passed on too early, or by nobody.
    (STAGED, SourceChange("bwd/adder.cuh", "      part().turn(block).wait(kOrdered ? predecessors : 1);\n", "")),
    (STAGED, SourceChange("bwd/adder.cuh", "      wait_bulk_groups_done();\n", "")),
    (STAGED, SourceChange("bwd/adder.cuh", "      part().turn(block).pass_on();\n", "")),
    (DIRECT, SourceChange("bwd/adder.cuh", "    part().turn(block).wait(predecessors);\n    ring_", "    ring_")),
    (DIRECT, SourceChange("bwd/write_dq.cuh", "Barrier::wait(&ring_.empty[0], RingState<1>{block.step}.phase());", "")),
    (
        DIRECT,
        SourceChange("bwd/write_dq.cuh", "RingState<1>{block.step}.phase()", "RingState<1>{block.step + 1}.phase()"),
    ),
    (DIRECT, SourceChange("bwd/adder.cuh", "    ring_.wait_full(at);\n    part()", "    part()")),
    (DIRECT, SourceChange("bwd/adder.cuh", "    part().turn(block).pass_on();\n  }", "  }")),
    # A first addition to what nobody has cleared, or that comes behind others; a block that nobody adds to.
    (PLAIN, SourceChange("bwd/adder.cuh", "if (predecessors == 0) {", "if (false) {")),
    (PLAIN, SourceChange("bwd/adder.cuh", "      part().turn(block).wait(kOrdered ? predecessors : 1);\n", "")),
    (PLAIN, SourceChange("bwd/adder.cuh", "      wait_bulk_groups_done();\n", "")),
    (PLAIN, SourceChange("bwd/adder.cuh", "if (kOrdered || predecessors == 0) {", "if (kOrdered) {")),
    (KEYLESS, SourceChange("bwd/preprocess.cuh", "kFirstStores || sees_no_key()", "kFirstStores")),
    # Blocks of queries that the producer loads in another order.
    (
        STAGED,
        SourceChange(
            "bwd/load.cuh",
            "key_tile().first_head_q + head, m_block",
            "key_tile().first_head_q + head, key_tile().blocks.end - 1 - m_block",
        ),
    ),
    # Keys loaded where gradients of the tile before still wait to leave, or cleared there.
    (PLAIN, SourceChange("bwd/load.cuh", "      Barrier::wait(&control_.kv_empty, tiles().count % 2 ^ 1);\n", "")),
    (PLAIN, SourceChange("bwd/load.cuh", "tiles().count % 2 ^ 1", "tiles().count % 2")),
    (PAIRED, SourceChange("bwd/key_chunks.cuh", "  meet_consumers<Traits>();  // all of", "  // all of")),
    # A tile's slot that is free before all have done with it, or that nobody frees.
    (UNSEEN, SourceChange("bwd/load.cuh", "    control_.tiles.wait_empty(tiles());\n", "")),
    (PLAIN, SourceChange("bwd/kernel.cuh", "DqAdder<Traits>::kNeeded ? kConsumers : 0", "0")),
    (PLAIN, SourceChange("bwd/adder.cuh", "    smem_.control.tiles.release(tiles());\n", "")),
    (PLAIN, SourceChange("bwd/kernel.cuh", "      control.tiles.release(at);\n", "")),
    # A tile that a CTA of a cluster does not hear of, or hears of too early; numbers that begin anew too early, or not.
    (PAIRED, SourceChange("bwd/tiles.cuh", "    control_.numbers.wait_full({control_.num_numbers++});\n", "")),
    (PASSED_OVER, SourceChange("bwd/tiles.cuh", "    control_.numbers.wait_empty({control_.num_numbers++});\n", "")),
    (PLAIN, SourceChange("core/tile_counter.cuh", "!= num_takers - 1", "!= num_takers - 2")),
    (PLAIN, SourceChange("core/tile_counter.cuh", "  counter->taken = 0;\n", "")),
    (PLAIN, SourceChange("core/tile_counter.cuh", "  __threadfence();\n  if", "  if")),
    (PLAIN, SourceChange("core/tile_counter.cuh", "  __threadfence();\n  counter", "  counter")),
    # A tile that is worked on twice.
    (PLAIN, SourceChange("core/schedule.h", "first_head + rest % heads};\n}\n\n// Of", "first_head};\n}\n\n// Of")),
]


@pytest.mark.parametrize(("case", "defect"), DEFECTS, ids=range(len(DEFECTS)))
def test_a_defect_shows(machine, case, defect):
    """Wrong, stuck, or, where order matters, not the same bits."""
    try:
        first, *rest = machine(differentiate, case, range(9), (2, 0), defect)
    except (AssertionError, RuntimeError):
        return
    assert case.deterministic
    assert not all(torch.equal(first[0], gradients[0]) for gradients in rest)
