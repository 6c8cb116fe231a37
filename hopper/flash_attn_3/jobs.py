"""How many compilers may run at once on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: Memory set aside for one compiler (bytes); a forward kernel needs about a third of it.
BYTES_PER_JOB = 1_200_000_000

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def job_count(requested: int | None = None) -> int:
    """`requested`, or as many jobs as cores and available memory allow; never more than MAX_JOBS, at least one.

    Raises:
        ValueError: `requested` or MAX_JOBS is not a positive integer.
    """
    limits = [_positive("MAX_JOBS", os.environ["MAX_JOBS"])] if os.environ.get("MAX_JOBS") else []
    if requested is not None:
        limits.append(_positive("jobs", requested))
    else:
        limits.append(_available_cores())
        memory = available_memory()
        if memory is not None:
            limits.append(memory // BYTES_PER_JOB)
    return max(1, min(limits))


def available_memory() -> int | None:
    """Bytes that can be used without swapping, within the container's limit; None where the system does not say."""
    amounts = [amount for amount in (_meminfo_available(), _cgroup_available()) if amount is not None]
    return min(amounts, default=None)


def _available_cores() -> int:
    # A container or a batch system may own fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meminfo_available() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(_MEMINFO), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup_available() -> int | None:
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if not (limit.isdigit() and used.isdigit()):
        return None  # no limit ("max"), or no cgroup v2
    found = re.search(r"^inactive_file (\d+)$", _read(_CGROUP / "memory.stat"), re.MULTILINE)
    reclaimable = int(found[1]) if found else 0
    return max(0, int(limit) - int(used) + reclaimable)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _positive(name: str, value: str | int) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r} is not supported; it must be a positive integer")
    return int(value)
