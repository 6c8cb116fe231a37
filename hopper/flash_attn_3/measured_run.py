"""Runs a command and reports what it cost; a script of its own, used on the compiler.

A child's peak memory, as the kernel counts it, includes the memory of the process it was forked from. Forking from
this small process, rather than from a program that holds gigabytes of tensors, keeps the figure honest.

Usage: python -I measured_run.py REPORT.json COMMAND [ARGUMENT ...]
"""

import json
import resource
import subprocess
import sys
import time


def main() -> int:
    report_file, *command = sys.argv[1:]
    start = time.perf_counter()
    code = subprocess.call(command)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    with open(report_file, "w") as file:
        json.dump(report, file)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
