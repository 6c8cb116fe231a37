"""Shared by all tests: import paths, the hypothesis profile, and why GPU tests are skipped."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

TESTS = Path(__file__).resolve().parent

sys.path.insert(0, str(TESTS))
if importlib.util.find_spec("flash_attn_3") is None:
    sys.path.insert(0, str(TESTS.parent / "hopper"))

# The tensors of CPU tests are small; on a busy machine their threads would mostly wait for each other.
torch.set_num_threads(1)

# A time limit per example would fail on a busy machine, not on a defect.
hypothesis.settings.register_profile("flash_attn_3", deadline=None, print_blob=True)
hypothesis.settings.load_profile("flash_attn_3")


def missing_hopper() -> str | None:
    """Why tests that need a Hopper GPU cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU; torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        name = torch.cuda.get_device_name()
        return f"needs a Hopper GPU (compute capability 9.0); {name} has {major}.{minor}"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", action="store_true", help="run the GPU tests in the emulator; for runs of tests/gpu alone"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--emulate"):
        return
    if not config.pluginmanager.hasplugin("cacheprovider"):
        raise pytest.UsageError("--emulate keeps its compiled kernels in pytest's cache: leave the cacheprovider on")
    from emulated_cuda import emulated_cuda

    machine = contextlib.ExitStack()
    machine.enter_context(emulated_cuda(config.cache.mkdir("emulated")))
    config.add_cleanup(machine.close)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--emulate"):
        needing = [item for item in gpu_items if item.get_closest_marker("hardware")]
        reason = "needs a GPU's streams, memory, multiprocessors or pace"
    else:
        needing, reason = gpu_items, missing_hopper() if gpu_items else None
    if reason is not None:
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))
