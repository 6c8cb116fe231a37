"""Shared by all tests: import paths, the hypothesis profile, and why GPU tests are skipped."""

import contextlib
import importlib.util
import random
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
    parser.addoption("--sample", type=int, metavar="N", help="run N of the collected tests, drawn at random")
    parser.addoption("--sample-seed", type=int, default=0, metavar="SEED", help="which ones; default 0")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    size = config.getoption("--sample")
    if size is not None and size < 1:
        raise pytest.UsageError(f"--sample={size} is not supported; it must be 1 or more")
    if not config.getoption("--emulate"):
        return
    if not config.pluginmanager.hasplugin("cacheprovider"):
        raise pytest.UsageError("--emulate keeps its compiled kernels in pytest's cache: leave the cacheprovider on")
    from emulated_cuda import emulated_cuda

    machine = contextlib.ExitStack()
    machine.enter_context(emulated_cuda(config.cache.mkdir("emulated")))
    config.add_cleanup(machine.close)


@pytest.hookimpl(trylast=True)  # a sample of what `-k` and `-m` leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    draw_sample(config, items)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--emulate"):
        needing = [item for item in gpu_items if item.get_closest_marker("hardware")]
        reason = "needs a GPU's streams, memory, multiprocessors or pace"
    else:
        needing, reason = gpu_items, missing_hopper() if gpu_items else None
    if reason is not None:
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))


def draw_sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave of the collected tests as many as `--sample` asks for, in their order."""
    size = config.getoption("--sample")
    if size is None or size >= len(items):
        return
    chosen = set(random.Random(config.getoption("--sample-seed")).sample(range(len(items)), size))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in chosen])
    items[:] = [item for i, item in enumerate(items) if i in chosen]
