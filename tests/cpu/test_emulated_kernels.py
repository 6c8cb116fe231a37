"""The kernels' own sources, run by the emulator: results by the rules that hold on the GPU, whoever is fast or slow.

Cases of the sanitizer runs: small, and of every path; for gradients, options that meet beside them. Each runs in three
orders of events: with asynchronous copies and products as early as they can be, as late, and at random.
"""

import os

import pytest
import torch
from tests.gpu import sanitizer_gradients, sanitizer_subset
from tests.gpu.cases import Case, GradientCase, each

import emulation

ORDERS = range(3)

DENSE = {"batch": 1, "heads_q": 2, "heads_kv": 1}
#: With sequences of no queries, of no keys, and of neither.
PACKED = {"lens_q": (70, 0, 0, 3, 130), "lens_k": (130, 0, 5, 0, 300), "heads_q": 2, "heads_kv": 1}
#: Most run kernels that the sanitizer's cases have compiled. Those of dense tensors that are ordered have
#: blocks of keys enough for another order to show.
MEETING_OPTIONS = [
    GradientCase(64, seqlen_q=333, seqlen_k=200, causal=True, with_dlse=True, **DENSE),
    GradientCase(128, used_q=(70, 0, 0, 3, 65), used_k=(1, 0, 5, 0, 129), causal=True, with_dlse=True, **PACKED),
    GradientCase(64, dtype=torch.float16, seqlen_q=70, seqlen_k=140, **DENSE),
    GradientCase(128, softcap=5.0, causal=True, **PACKED),
    GradientCase(64, seqlen_q=150, seqlen_k=700, causal=True, deterministic=True, **DENSE),
    GradientCase(192, seqlen_q=150, seqlen_k=300, causal=True, deterministic=True, **DENSE),
    GradientCase(192, 128, seqlen_q=150, seqlen_k=700, causal=True, deterministic=True, **DENSE),
    GradientCase(128, window_size=(150, 15), deterministic=True, spare_q=3, **PACKED),
    GradientCase(256, causal=True, deterministic=True, **PACKED),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    cases = [*sanitizer_subset.CASES, *sanitizer_gradients.CASES, *MEETING_OPTIONS]
    # Processes that run tests beside each other share what they compile.
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    configs = [config for case in cases for config in case.kernel_configs()]
    machine = emulation.EmulatedMachine(folder / "emulated_kernels", configs=configs)
    yield machine.call
    machine.close()


def run_forward(emulator, case, seed):
    emulator.seed(seed)
    sanitizer_subset.run_case(case, "cpu")


def run_backward(emulator, case):
    found = []
    for seed in ORDERS:
        emulator.seed(seed)
        found.append(sanitizer_gradients.run_case(case, "cpu"))
    same = slice(0 if case.deterministic else 1, None)  # dk and dv have one writer
    for gradients in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0][same], gradients[same], strict=True)), "the order shows"


@each(sanitizer_subset.CASES)
def test_forward(machine, case: Case):
    for seed in ORDERS:
        machine(run_forward, case, seed)


@each([*sanitizer_gradients.CASES, *MEETING_OPTIONS])
def test_backward(machine, case: GradientCase):
    """R3, R4, W6: right in each order, and all but dq of unordered additions the same bits."""
    machine(run_backward, case)
