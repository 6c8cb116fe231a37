"""The measuring process: takes jobs from stdin, checks and times their variants, answers with events.

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
from ..timing import TurnTimer
from . import correctness
from .build import kernel_store
from .job import Job, Variant, job_from_plain
from .launch import prepare

Emit = Callable[..., None]


def main() -> int:
    events = _take_stdout()

    def emit(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=events, flush=True)

    try:
        torch.cuda.init()
        emit("ready", device=environment.device(), versions=environment.versions())
        for line in sys.stdin:
            measure(job_from_plain(json.loads(line)), emit)
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
            kernel = _load(job, variant)
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
            torch.cuda.synchronize()  # raises after a fault on the device: nothing more can run in this process
            wrong = f"cannot be launched: {type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            emit("failed", variant=number, reason=wrong)
            continue
        emit("checked", variant=number, relative_error=correctness.relative_error(out, trials[-1].exact, shape))
        calls[number] = call
    _time(job, calls, emit)
    emit("done")


def _num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def _load(job: Job, variant: Variant) -> CompiledKernel:
    config = job.shape.key.config(variant.choice.tile)
    store = kernel_store(None if job.kernels is None else Path(job.kernels))
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
