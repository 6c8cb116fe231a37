"""Shared by all tests: import paths, the hypothesis profile, and why GPU tests are skipped."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = missing_hopper() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
