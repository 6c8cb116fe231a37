"""Where and with what something was measured, for the head of a result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def date() -> str:
    """Now, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def commit(root: Path) -> str:
    """The commit checked out at `root`, with "+" if its sources differ; "unknown" where that is no clone."""
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return "unknown"
    return revision + ("+" if _git(root, "status", "--porcelain", "--", "hopper", "csrc") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def device() -> dict[str, Any]:
    """The GPU if there is one, and the host."""
    import torch

    host = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    if not torch.cuda.is_available():
        return {"name": "CPU", **host}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "driver": _driver_version(),
        **host,
    }


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions() -> dict[str, Any]:
    """Versions of what takes part in a measurement."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
    }
    for package in ("triton", "flash-attn-4", "nvidia-cutlass-dsl", "apache-tvm-ffi", "nvidia-cutlass"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
