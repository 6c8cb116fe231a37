"""The kernels' own sources, run by the emulator: results by the rules that hold on the GPU, whoever is fast or slow.

Cases of the sanitizer runs: small, and of every path. Each runs in three orders of events: with asynchronous copies and
products as early as they can be, as late, and at random.
"""

import os

import pytest
from tests.gpu import sanitizer_gradients, sanitizer_subset
from tests.gpu.cases import Case, GradientCase, each

import emulation

ORDERS = range(3)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    cases = [*sanitizer_subset.CASES, *sanitizer_gradients.CASES]
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


def run_backward(emulator, case, seed):
    emulator.seed(seed)
    sanitizer_gradients.run_case(case, "cpu")


@each(sanitizer_subset.CASES)
def test_forward(machine, case: Case):
    for seed in ORDERS:
        machine(run_forward, case, seed)


@each(sanitizer_gradients.CASES)
def test_backward(machine, case: GradientCase):
    for seed in ORDERS:
        machine(run_backward, case, seed)
