"""All tests of this folder carry the marker `gpu`; a hung kernel ends the run and names its test."""

from __future__ import annotations

import faulthandler
import os
import pathlib

import pytest
import torch

from flash_attn_3 import dispatch, runtime

#: A test takes milliseconds; one that builds a missing kernel takes seconds. Longer than this is a deadlock.
HANG_SECONDS = 120
_FOLDER = pathlib.Path(__file__).parent
_stderr_copy: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    # Output capture replaces file descriptor 2 while a test runs; the watchdog writes to this copy of it.
    _stderr_copy.append(os.dup(2))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _watchdog(request: pytest.FixtureRequest):
    """A kernel that never ends cannot be interrupted: leave with a traceback that shows which test hangs.

    The emulator takes its time, and reports a deadlock by itself.
    """
    if request.config.getoption("--emulate"):
        yield
        return
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=_stderr_copy[0])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _errors_belong_to_their_test(_watchdog):
    """CUDA errors are asynchronous: wait, so that a bad access fails the test that made it."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def gigabytes():
    """`gigabytes(n)` skips the test unless n GB of GPU memory are free, and gives the memory back afterwards."""

    def require(needed: float) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < needed * 1e9:
            pytest.skip(f"needs {needed:.0f} GB of free GPU memory, {free / 1e9:.0f} GB are free")

    yield require
    torch.cuda.empty_cache()


@pytest.fixture
def launched_ctas(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """By "forward" and "backward": the main kernels' grids of the calls from now on, each of another signature."""
    grids: dict[str, list[int]] = {}

    def watch(direction: str, cache: str) -> None:
        launcher = getattr(runtime, f"{direction}_launcher")
        grids[direction] = []

        def watched_launcher(kernels, **options):
            grids[direction].append(options["num_ctas"])
            return launcher(kernels, **options)

        monkeypatch.setattr(runtime, f"{direction}_launcher", watched_launcher)
        monkeypatch.setattr(dispatch, cache, {})

    watch("forward", "_launches")
    watch("backward", "_backward_launches")
    return grids
