"""Real backward kernels through the real compiler: instructions, spills, time and memory."""

import dataclasses

import pytest
from benchmarks.sass import opcodes

from compile_tools import disassemble
from flash_attn_3 import compiler, presets
from flash_attn_3.backward_config import Accumulation, BackwardConfig, DqPath
from flash_attn_3.backward_plan import BackwardProblem, plan_backward
from flash_attn_3.config import Dtype, Mask, Score, SeqLayout
from flash_attn_3.problem import ForwardProblem, MaskSpec

pytestmark = pytest.mark.compile

#: What the kernels of one backward pass may cost: seconds of one core, and resident memory.
BUDGET_SECONDS = 10.0
BUDGET_BYTES = 1_200_000_000


def planned(
    head_dim: int,
    mask: Mask,
    head_dim_v: int | None = None,
    layout: SeqLayout = SeqLayout.DENSE,
    score: Score = Score.SCALED,
    accumulation: Accumulation = Accumulation.UNORDERED,
    dtype: Dtype = Dtype.BF16,
) -> BackwardConfig:
    """The kernels that the planner chooses for calls of this kind."""
    problem = ForwardProblem(
        dtype, 2, 8192, 8192, 16, 16, head_dim, head_dim_v or head_dim, MaskSpec(mask), score, layout, 132
    )
    return plan_backward(BackwardProblem(problem, accumulation)).config


#: The kernels with the most registers in use come last.
REPRESENTATIVES = [
    *(config for config in presets.core_configs() if isinstance(config, BackwardConfig) and config.dtype is Dtype.BF16),
    planned(128, Mask.CAUSAL, dtype=Dtype.FP16),
    planned(64, Mask.LOCAL, 128, SeqLayout.VARLEN),
    *(planned(d, mask, dv) for d, dv in [(192, 128), (192, 192), (256, 256)] for mask in (Mask.FULL, Mask.CAUSAL)),
    planned(192, Mask.LOCAL, 128, SeqLayout.VARLEN, accumulation=Accumulation.ORDERED),
    planned(192, Mask.CAUSAL, 128, accumulation=Accumulation.ORDERED, dtype=Dtype.FP16),
    planned(192, Mask.LOCAL, 128, SeqLayout.VARLEN, Score.SOFTCAP, Accumulation.ORDERED),
    planned(256, Mask.LOCAL, 256, SeqLayout.VARLEN, accumulation=Accumulation.ORDERED, dtype=Dtype.FP16),
    planned(256, Mask.LOCAL, 256, SeqLayout.VARLEN, Score.SOFTCAP, Accumulation.ORDERED),
    planned(128, Mask.FULL, score=Score.SOFTCAP, accumulation=Accumulation.ORDERED),
    planned(64, Mask.LOCAL, layout=SeqLayout.VARLEN, accumulation=Accumulation.ORDERED),
    planned(64, Mask.LOCAL, 64, SeqLayout.VARLEN, Score.SOFTCAP, Accumulation.ORDERED),
    planned(128, Mask.LOCAL, 128, SeqLayout.VARLEN, Score.SOFTCAP, Accumulation.ORDERED),
    *(
        dataclasses.replace(planned(192, Mask.CAUSAL, 128, accumulation=accumulation), dq_path=DqPath.DIRECT)
        for accumulation in Accumulation
    ),
]


@pytest.mark.parametrize("config", REPRESENTATIVES, ids=lambda config: config.name)
class TestBackwardKernels:
    def test_nothing_spills(self, compile_kernel, config):
        """In none of the three kernels: the report has the worst of them."""
        meta = compile_kernel(config).meta
        assert (meta["spill_store_bytes"], meta["spill_load_bytes"], meta["stack_bytes"]) == (0, 0, 0)

    def test_launch_registers_fill_the_register_file(self, compile_kernel, config):
        kernels = compile_kernel(config)
        assert kernels.meta["registers"] == 65536 // kernels.num_threads // 8 * 8

    def test_costs_stay_in_the_budget(self, compile_kernel, config, record_property):
        meta = compile_kernel(config).meta
        for figure in ("compile_seconds", "compile_cpu_seconds", "compile_peak_bytes"):
            record_property(figure, meta[figure])
        # Seconds of CPU rather than of the wall clock: a busy machine does not make the kernels more expensive.
        assert 0 < meta["compile_cpu_seconds"] <= BUDGET_SECONDS
        assert 0 < meta["compile_peak_bytes"] <= BUDGET_BYTES

    def test_uses_hoppers_instructions(self, compile_kernel, config):
        lines = disassemble(compile_kernel(config))
        instructions = opcodes(lines)
        # One step's chains, each 16 deep an instruction: S and dP, dV and dK, dQ.
        chains = (config.head_dim + config.head_dim_v + 2 * config.block_m + config.block_n) // 16
        assert instructions["HGMMA"] >= chains
        assert instructions["UTMALDG"] >= 4  # q, dout, k, v
        assert instructions["UTMASTG"] >= 2  # dk, dv
        assert instructions["UBLKRED" if config.dq_path is DqPath.STAGED else "REDG"] >= 1  # dq
        assert any(line.startswith("UBLKCP.S.S") for line in lines) == (config.cluster_size > 1)  # dS to the other CTA
        assert instructions["USETMAXREG"] >= 2  # producer and consumers
        assert instructions["HMMA"] == 0  # the tensor-core instruction of older GPUs
        assert instructions["LDL"] == instructions["STL"] == 0  # local memory


@pytest.mark.parametrize("name", ["dq_columns", "preprocess_threads"])
def test_drift_between_python_and_headers_stops_the_build(compile_kernel, monkeypatch, name):
    monkeypatch.setattr(BackwardConfig, name, property(lambda config: 32))
    config = dataclasses.replace(planned(128, Mask.FULL), num_stages=3)
    with pytest.raises(compiler.KernelCompileError, match=f"{name}: the Python configuration and"):
        compile_kernel(config)
