"""Real kernels through the real compiler, on any machine that has one: instructions, spills, time and memory."""

import dataclasses

import pytest
from benchmarks.sass import opcodes, product_loops, steps, usual_path

from compile_tools import disassemble
from flash_attn_3 import compiler
from flash_attn_3.config import Dtype, ForwardConfig, Mask, OutputBuffer, Rescale, Schedule, Score, SeqLayout
from flash_attn_3.heuristics import forward_config
from flash_attn_3.problem import ForwardProblem, MaskSpec

pytestmark = pytest.mark.compile

#: What a forward kernel may cost: seconds of one core, and resident memory.
BUDGET_SECONDS = 6.0
BUDGET_BYTES = 800_000_000


def planned(
    head_dim: int,
    mask: Mask,
    head_dim_v: int | None = None,
    dtype: Dtype = Dtype.BF16,
    layout: SeqLayout = SeqLayout.DENSE,
    score: Score = Score.SCALED,
) -> ForwardConfig:
    """The kernel that the planner chooses for long sequences of this kind."""
    problem = ForwardProblem(
        dtype, 2, 8192, 8192, 16, 16, head_dim, head_dim_v or head_dim, MaskSpec(mask), score, layout, 132
    )
    return forward_config(problem)


D128_CAUSAL = planned(128, Mask.CAUSAL)
REPRESENTATIVES = [
    D128_CAUSAL,
    planned(128, Mask.FULL),
    planned(64, Mask.FULL),
    planned(256, Mask.CAUSAL),
    planned(192, Mask.CAUSAL, head_dim_v=128),
    planned(128, Mask.LOCAL, dtype=Dtype.FP16, layout=SeqLayout.VARLEN, score=Score.SOFTCAP),
]


@pytest.mark.parametrize("config", REPRESENTATIVES, ids=lambda config: config.name)
class TestRepresentativeKernels:
    def test_nothing_spills(self, compile_kernel, config):
        meta = compile_kernel(config).meta
        assert (meta["spill_store_bytes"], meta["spill_load_bytes"], meta["stack_bytes"]) == (0, 0, 0)

    def test_launch_registers_fill_the_register_file(self, compile_kernel, config):
        # setmaxnreg starts from what ptxas gives under the launch bounds: 64K registers over the CTA's threads, in
        # multiples of 8. Any other count means that the launch bounds, and with them the split, did not hold.
        kernel = compile_kernel(config)
        assert kernel.meta["registers"] == 65536 // kernel.num_threads // 8 * 8

    def test_uses_hoppers_instructions(self, compile_kernel, config):
        instructions = opcodes(disassemble(compile_kernel(config)))
        # The least there can be: one chain of products for S = Q K^T and one for O += P V, 16 deep each step.
        assert instructions["HGMMA"] >= config.head_dim // 16 + config.block_n // 16
        assert instructions["UTMALDG"] >= 3  # q, k, v
        assert (instructions["UTMASTG"] >= 1) == (config.output_buffer is not OutputBuffer.NONE)  # out
        assert instructions["USETMAXREG"] >= 2  # producer and consumers
        assert instructions["HMMA"] == 0  # the tensor-core instruction of older GPUs
        assert instructions["LDL"] == instructions["STL"] == 0  # local memory

    def test_softmax_runs_beside_the_product(self, compile_kernel, config):
        # The exponentials of a step come before its wait for PV: the compiler likes to move that wait up.
        loops = product_loops(disassemble(compile_kernel(config)))
        assert len(loops) >= 1 + (config.mask is not Mask.FULL) + (config.mask is Mask.LOCAL)
        for step in loops:
            waits = [index for index, line in enumerate(step) if line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0")]
            exponentials = [index for index, line in enumerate(step) if line.startswith("MUFU.EX2")]
            assert len(waits) == 1
            assert len(exponentials) >= config.block_n // 2
            assert max(exponentials) < waits[0]

    def test_costs_are_recorded(self, compile_kernel, config, record_property):
        meta = compile_kernel(config).meta
        for figure in ("compile_seconds", "compile_cpu_seconds", "compile_peak_bytes"):
            record_property(figure, meta[figure])
            assert meta[figure] > 0
        print(
            f"{config.name}: {meta['compile_seconds']:.1f} s ({meta['compile_cpu_seconds']:.1f} s of CPU), "
            f"{meta['compile_peak_bytes'] / 1e9:.2f} GB"
        )


@pytest.mark.parametrize(("head_dim", "mask"), [(64, Mask.FULL), (64, Mask.CAUSAL), (128, Mask.FULL), (256, Mask.FULL)])
def test_a_block_is_tried_without_its_maximum(compile_kernel, head_dim, mask):
    """Rescale.ON_OVERFLOW: a step over full blocks, without its second try."""
    config = dataclasses.replace(planned(head_dim, mask), rescale=Rescale.ON_OVERFLOW)
    kernel = compile_kernel(config)
    assert (kernel.meta["spill_store_bytes"], kernel.meta["spill_load_bytes"]) == (0, 0)
    lines = disassemble(kernel)
    loop = next(loop for loop in product_loops(lines) if opcodes(loop)["HMMA"] > 0)
    assert opcodes(loop)["HMMA"] >= config.block_n // 8  # the second try's products
    usual = usual_path(loop)
    found = opcodes(usual)
    assert found["MUFU"] == config.block_n // 2
    assert found["FMNMX"] == found["SHFL"] == found["HMMA"] == 0
    assert found["VOTE"] == 1
    wait = next(index for index, line in enumerate(usual) if line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    assert opcodes(usual[:wait])["MUFU"] == config.block_n // 2
    # What it is for.
    eager = compile_kernel(dataclasses.replace(config, rescale=Rescale.EAGER))
    assert steps(lines)[0].total() < 0.9 * steps(disassemble(eager))[0].total()


#: As many keys as the registers allow where S and P share them.
TURNS_ALONE = [
    dataclasses.replace(
        planned(head_dim, mask, layout=layout),
        schedule=Schedule.PING_PONG,
        block_m=block_m,
        block_n=block_n,
        output_buffer=OutputBuffer.NONE,
        num_q_stages=1,
        rescale=rescale,
    )
    for head_dim, mask, layout, block_m, block_n, rescale in (
        (64, Mask.LOCAL, SeqLayout.VARLEN, 192, 176, Rescale.EAGER),
        (64, Mask.CAUSAL, SeqLayout.VARLEN, 192, 176, Rescale.ON_OVERFLOW),
        (64, Mask.CAUSAL, SeqLayout.DENSE, 256, 80, Rescale.LAZY),
        (128, Mask.CAUSAL, SeqLayout.DENSE, 192, 128, Rescale.EAGER),
    )
]


@pytest.mark.parametrize("config", TURNS_ALONE, ids=lambda config: config.name)
def test_a_turn_ends_before_the_softmax(compile_kernel, config):
    """PV, QK, the turn passed on, and only then, with nothing in flight, the exponentials; and nothing spills."""
    config.validate()
    kernel = compile_kernel(config)
    assert (kernel.meta["spill_store_bytes"], kernel.meta["spill_load_bytes"]) == (0, 0)
    for step in product_loops(disassemble(kernel)):
        usual = usual_path(step)
        products, waits, exponentials, turns = (
            [index for index, line in enumerate(usual) if line.startswith(start)]
            for start in ("HGMMA", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2", "BAR.ARV")
        )
        values_done, scores_done = waits
        assert [index < values_done for index in products] == [True] * (config.block_n // 16) + [False] * (
            config.head_dim // 16
        )
        assert products[-1] < turns[-1] < scores_done < exponentials[0]
        assert len(exponentials) >= config.block_n // 2


def test_compile_budget(compile_kernel):
    # Seconds of CPU rather than of the wall clock: a busy machine does not make the kernel more expensive.
    meta = compile_kernel(D128_CAUSAL).meta
    assert meta["compile_cpu_seconds"] <= BUDGET_SECONDS
    assert meta["compile_peak_bytes"] <= BUDGET_BYTES


def test_drift_between_python_and_headers_stops_the_build(compile_kernel, monkeypatch):
    monkeypatch.setattr(ForwardConfig, "producer_registers", property(lambda config: 40))
    config = dataclasses.replace(D128_CAUSAL, num_stages=3, block_n=64)
    with pytest.raises(compiler.KernelCompileError, match="producer_registers: the Python configuration and"):
        compile_kernel(config)
