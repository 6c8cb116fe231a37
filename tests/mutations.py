"""Whether the emulator misses each wait, fence, signal and release of the kernels: takes them out one at a time.

    PYTHONPATH=hopper:. python tests/mutations.py --family bwd

Statements that call for one are taken out; what lies behind the calls is the same for all of them. Prints what was
found for each. A statement that nobody misses is either not needed, or in a blind spot.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import emulation
from emulated_tiles import run_tile
from emulation import EmulatedMachine, Emulator, SourceChange
from flash_attn_3 import compiler
from flash_attn_3.config import KernelConfig, OutputBuffer, Rescale, Schedule
from tests.gpu.cases import Case, GradientCase
from tests.gpu.harness import make_tensors
from tests.gpu.sanitizer_gradients import run_case

KERNELS = Path(__file__).resolve().parent.parent / "csrc" / "kernels"
#: Gradients: so many that some CTAs, two of which may be a cluster, wait for others. Forward: so few that each works on
#: many tiles.
NUM_SMS = {"bwd": 6, "fwd": 2}
SEEDS = range(3)

CALLS = (
    *("fence_view_async_shared", "fence_proxies", "fence_barrier_init", "__threadfence"),
    *("wait_full", "wait_empty", "Barrier::wait", "tma_store_wait<0>", "wait_bulk_groups_done", r"warpgroup_wait<\d>"),
    *("__syncwarp", "__syncthreads", "sync_cluster", "sync_all<Traits>", "NamedBarrier::sync", "NamedBarrier::arrive"),
    *("sync_warpgroup", "meet_consumers<Traits>", "await_warpgroup", "signal_warpgroup", "wait_buffer_free"),
    *("Barrier::arrive", "arrive_and_expect_tx", "release", "pass_on", "close_counter"),
    *(r"turn_\.begin", r"turn_\.wait", r"turn\(block\)\.wait"),
)
_CALL = rf"\b(?:{'|'.join(CALLS)})\("
_CONDITION = r"(?:if|if constexpr|for) \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\) "
_STATEMENT = re.compile(rf"^(\s*(?:{_CONDITION})*)((?:[\w:.&\[\]<>-]|\(\w*\))*{_CALL}.*\)); *(?://.*)?$")

DENSE = {"batch": 2, "seqlen_q": 200, "seqlen_k": 400, "heads_q": 4, "heads_kv": 2}
VARLEN = {"lens_q": (70, 0, 300), "lens_k": (200, 5, 130), "heads_q": 2, "heads_kv": 2}
LONG = {"batch": 1, "seqlen_q": 130, "seqlen_k": 900, "heads_q": 2, "heads_kv": 1}
KEYS = [
    GradientCase(64, **DENSE, causal=True),
    GradientCase(192, 128, **LONG, deterministic=True),
    GradientCase(128, **VARLEN, deterministic=True),
]
COLUMNS = [
    GradientCase(256, **LONG, dtype=torch.float16, deterministic=True),
    GradientCase(256, **DENSE, softcap=5.0, causal=True),
    GradientCase(192, **LONG, deterministic=True),
    GradientCase(256, batch=5, seqlen_q=70, seqlen_k=900, used_k=(900, 5, 5, 5, 130), heads_q=2),
]
FORWARD = [
    (Case(64, **DENSE, causal=True), {}),
    (Case(128, **DENSE, window_size=(64, 0)), {"num_q_stages": 1, "output_buffer": OutputBuffer.WITH_Q, "block_n": 48}),
    (Case(96, **DENSE), {"block_m": 192, "block_n": 64, "cluster_size": 2}),
    (Case(128, **DENSE, window_size=(64, 0)), {"schedule": Schedule.INTRA_WARPGROUP, "block_n": 48}),
    (Case(64, **DENSE, causal=True), {"schedule": Schedule.PING_PONG, "block_n": 80}),
    (Case(64, **DENSE, softmax_scale=20.0), {"rescale": Rescale.ON_OVERFLOW}),  # scores that overflow
    # Three heads packed: the last row of each warpgroup is unused.
    (Case(64, batch=2, seqlen_q=25, seqlen_k=400, heads_q=6, heads_kv=2), {"rescale": Rescale.ON_OVERFLOW}),
    (Case(72, **VARLEN, causal=True), {}),
    (Case(256, **DENSE, causal=True), {}),
]


@dataclasses.dataclass(frozen=True)
class Mutation:
    header: str
    line: int
    change: SourceChange

    def __str__(self) -> str:
        return f"{self.header}:{self.line}"


def headers(family: str) -> list[Path]:
    """A family's own; `core`, but for instructions, is looked at with the forward kernels."""
    shared = [path for path in (KERNELS / "core").glob("*.cuh") if path.name != "ptx.cuh"]
    return sorted([*(KERNELS / family).glob("*.cuh"), *(shared if family == "fwd" else [])])


def calls_for_order(line: str) -> bool:
    """Whether code on the line, beside a function's own definition, calls for a wait, fence, signal or release."""
    code = line.split("//")[0]
    return re.search(_CALL, code) is not None and "FA_DEVICE" not in code


def mutations(family: str) -> Iterator[Mutation]:
    for header in headers(family):
        lines = header.read_text().splitlines(keepends=True)
        for number, line in enumerate(lines):
            found = _STATEMENT.match(line)
            if found is None or "FA_DEVICE" in line:
                continue
            before, after = "".join(lines[:number]), "".join(lines[number + 1 :])
            name = str(header.relative_to(KERNELS))
            yield Mutation(name, number + 1, SourceChange(name, before + line + after, f"{before}{found[1]};\n{after}"))


def cases_for(mutation: Mutation, family: str) -> list:
    """Those that run the header first."""
    if family == "fwd":
        return FORWARD
    columns_first = mutation.header in ("bwd/mma_columns.cuh", "bwd/key_chunks.cuh")
    return [*COLUMNS, *KEYS] if columns_first else [*KEYS, *COLUMNS]


def run_backward(emulator: Emulator, case: GradientCase, change: SourceChange) -> None:
    def kernel(config: KernelConfig) -> emulation.HostKernel:
        return emulator.kernel(config, change if config.FAMILY == "bwd" else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_kernel", kernel)
        found = []
        for seed in SEEDS:
            emulator.seed(seed)
            found.append(run_case(case, "cpu"))
    if case.deterministic:
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True)), "the order shows"


def run_forward(emulator: Emulator, case: Case, changes: dict, change: SourceChange) -> None:
    run_tile(emulator, case, make_tensors(case, "cpu"), changes, SEEDS, change)


class Worker(threading.local):
    """A machine for each thread."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.machine: EmulatedMachine | None = None

    def complaint(self, mutation: Mutation, family: str) -> str | None:
        """The first one; None if nothing is missed."""
        for case in cases_for(mutation, family):
            if self.machine is None:
                self.machine = EmulatedMachine(self.folder, NUM_SMS[family])
            try:
                if family == "fwd":
                    self.machine.call(run_forward, *case, mutation.change)
                else:
                    self.machine.call(run_backward, case, mutation.change)
            except concurrent.futures.process.BrokenProcessPool:
                self.machine = None
                return "the process ended"
            except AssertionError:
                return "wrong results"
            except RuntimeError as error:
                return _first_sentence(str(error))
        return None


def _first_sentence(complaint: str) -> str:
    """Of what the machine says behind the kernel's name and the seed."""
    return re.sub(r"^.*seed \d+: |\. CTA .*$|\)$", "", complaint, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("fwd", "bwd"), required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of HEADER:LINE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        worker = Worker(Path(folder))
        chosen = [x for x in mutations(options.family) if any(part in str(x) for part in options.only)]
        complaints = pool.map(lambda mutation: worker.complaint(mutation, options.family), chosen)
        for mutation, complaint in zip(chosen, complaints, strict=True):
            print(f"{mutation}: {complaint or 'NOBODY MISSES IT'}", flush=True)


if __name__ == "__main__":
    main()
