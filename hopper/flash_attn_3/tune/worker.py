"""The measuring process: takes jobs from stdin, checks their variants, times those of a shape, answers with events.

It is a process of its own because a kernel that hangs or faults takes its process along; see `process.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import environment
from ..cache import CompiledKernel, EntryKey
from ..heuristics import plan_choice
from ..tile_table import TileKey
from ..timing import TurnTimer
from . import correctness, serving
from .build import kernel_store
from .job import Audit, Job, Variant, job_from_plain
from .launch import prepare
from .shapes import softcap_of

Emit = Callable[..., None]


def main() -> int:
    events = _take_stdout()

    def emit(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=events, flush=True)

    try:
        torch.cuda.init()
        emit("ready", device=environment.device(), versions=environment.versions())
        for line in sys.stdin:
            job = job_from_plain(json.loads(line))
            audit(job, emit) if isinstance(job, Audit) else measure(job, emit)
    except Exception as error:
        emit("crashed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


def _take_stdout() -> TextIO:
    """The stream of events; whatever else is printed goes to stderr."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return events


def measure(job: Job, emit: Emit, device: str = "cuda") -> None:
    """Check each variant of a job on all trials, then time those that are right on the last one."""
    shape, problem = job.shape, job.shape.problem(_num_sms())
    trials = correctness.trials(shape, device)
    out = torch.empty_like(trials[0].v)
    lse = torch.empty(shape.batch, shape.heads, shape.seqlen, device=device)
    calls: dict[int, Callable[[], None]] = {}
    for number, variant in enumerate(job.variants):
        emit("launching", variant=number)
        try:
            kernel = _load(job.kernels, variant, shape.key)
            plan = plan_choice(problem, variant.choice)
            for trial in trials:
                call = prepare(kernel, problem, plan, shape.softcap, (trial.q, trial.k, trial.v, out, lse))
                out.fill_(float("nan"))
                lse.fill_(float("nan"))
                call()
                wrong = correctness.what_is_wrong(out, lse, trial.exact, shape)
                if wrong:
                    break
        except Exception as error:
            wrong = _refused(error)
        if wrong:
            emit("failed", variant=number, reason=wrong)
            continue
        emit("checked", variant=number, relative_error=correctness.relative_error(out, trials[-1].exact, shape))
        calls[number] = call
    _time(job, calls, emit)
    emit("done")


def audit(job: Audit, emit: Emit, device: str = "cuda") -> None:
    """Hold each kernel against the calls of its dtype and layout that are not timed."""
    for number, variant in enumerate(job.variants):
        emit("launching", variant=number)
        try:
            wrong = _fault(_load(job.kernels, variant, job.key), variant, job.key, device)
        except Exception as error:
            wrong = _refused(error)
        if wrong:
            emit("failed", variant=number, reason=wrong)
        else:
            emit("audited", variant=number)
    emit("done")


def _fault(kernel: CompiledKernel, variant: Variant, key: TileKey, device: str) -> str | None:
    """What is wrong with a kernel, and with which call."""
    for call in serving.served_calls(key, variant.dtype, variant.seq_layout, _num_sms(), device):
        out, lse = call.new_results()
        plan = plan_choice(call.problem, variant.choice)
        tensors = (call.q, call.k, call.v, out, lse)
        prepare(kernel, call.problem, plan, softcap_of(key.score), tensors, call.cu_seqlens)()
        wrong = serving.what_is_wrong(out, lse, call)
        if wrong:
            return f"{call.name}: {wrong}"
    return None


def _refused(error: Exception) -> str:
    torch.cuda.synchronize()  # raises after a fault on the device: nothing more can run in this process
    return f"cannot be launched: {type(error).__name__}: {error}".splitlines()[0]


def _num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def _load(kernels: str | None, variant: Variant, key: TileKey) -> CompiledKernel:
    config = variant.config(key)
    store = kernel_store(None if kernels is None else Path(kernels))
    kernel = store.load(config, EntryKey(config.name, variant.source_key, variant.build_key))
    if kernel is None:
        raise FileNotFoundError(f"{config.name} is not in {store.root}")
    return kernel


def _time(job: Job, calls: dict[int, Callable[[], None]], emit: Emit) -> None:
    named = {str(number): call for number, call in calls.items()}
    timer = TurnTimer(named, announce=lambda name: emit("launching", variant=int(name)))
    timer.warm_up(job.warm_up)
    for turns in job.turns:
        if not named:
            return
        medians = timer.round(named, turns)
        emit("round", ms=medians)
        limit = min(medians.values()) * (1.0 + job.drop_behind)
        named = {n: call for n, call in named.items() if medians[n] <= limit or job.variants[int(n)].is_present}


if __name__ == "__main__":
    sys.exit(main())
