"""Runs the measuring process and outlives it: a variant that hangs or crashes costs that variant, not the sweep.

Of those behind it are spared which share what several had in common that died (`Suspects`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from typing import Any

from .job import Audit, Job, Variant, job_to_plain
from .suspects import Suspects

COMMAND = (sys.executable, "-m", "flash_attn_3.tune.worker")
#: Seconds that a process may take to start: it imports torch and opens the device.
START_SECONDS = 180.0
#: How often the process is started anew for one shape before the shape is given up.
MOST_RESTARTS = 24


class WorkerError(RuntimeError):
    """The measuring process does not start; the text has its own reason."""


@dataclasses.dataclass
class Measured:
    """What came of a job.

    Attributes:
        rounds_ms: for each variant that is right, milliseconds per round; fewer rounds where it was left out as slow.
        errors: its relative error.
        failed: for each other variant, why it was not timed, or not even launched.
        abandoned: why the shape was given up, None where it was not.
    """

    rounds_ms: dict[Variant, list[float]] = dataclasses.field(default_factory=dict)
    errors: dict[Variant, float] = dataclasses.field(default_factory=dict)
    failed: dict[Variant, str] = dataclasses.field(default_factory=dict)
    abandoned: str | None = None


class _Died(Exception):
    """The process ended, or said nothing for too long."""


class Worker:
    """The measuring process, started when it is first needed.

    Args:
        timeout: seconds after which a process that reports nothing counts as hung. It reports before each turn.
        command: what to run.
    """

    def __init__(self, timeout: float, command: Sequence[str] = COMMAND) -> None:
        self._timeout = timeout
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._events: queue.Queue[str | None] = queue.Queue()
        #: The GPU's name, and the versions of what takes part; known once the process has started.
        self.device: str | None = None
        self.versions: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def measure(self, job: Job | Audit, suspects: Suspects) -> Measured:
        """Measure or audit, anew without the variant at fault whenever the process dies.

        Args:
            suspects: what is known of the key's tiles; learns what this job shows.

        Raises:
            WorkerError: the process does not start.
        """
        failed: dict[Variant, str] = {}
        for _ in range(MOST_RESTARTS + 1):
            failed |= _left_out(job, failed, suspects)
            variants = tuple(variant for variant in job.variants if variant not in failed)
            measured = Measured(failed=failed)
            if not any(not variant.is_present for variant in variants):
                return measured
            if self._process is None:
                self._start()
            attempt = _Attempt(dataclasses.replace(job, variants=variants), measured)
            try:
                self._run(attempt)
            except _Died as death:
                self._stop()
                if attempt.running is None:
                    return Measured(failed=failed, abandoned=f"{death}, with no kernel running")
                failed[attempt.running] = str(death)
                suspects.died(attempt.running.choice.tile)
            else:
                return measured
            finally:
                for variant in measured.errors:
                    suspects.was_right(variant.choice.tile)
        return Measured(failed=failed, abandoned=f"{MOST_RESTARTS + 1} kernels hung or crashed")

    def _run(self, attempt: _Attempt) -> None:
        try:
            print(json.dumps(job_to_plain(attempt.job)), file=self._process.stdin, flush=True)
        except OSError as error:
            raise _Died(f"the measuring process is gone ({error})") from error
        while not attempt.done:
            attempt.take(self._next_event(self._timeout))

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events = queue.Queue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._events), daemon=True).start()
        try:
            event = self._next_event(START_SECONDS)
        except _Died as death:
            self._stop()
            raise WorkerError(f"the measuring process {' '.join(self._command)} does not start: {death}") from death
        self.device, self.versions = event["device"]["name"], event["versions"]

    def _next_event(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._events.get(timeout=seconds)
        except queue.Empty:
            raise _Died(f"hung: reported nothing for {seconds:.0f} s") from None
        if line is None:
            raise _Died(f"crashed with exit code {self._process.wait()}")
        event = json.loads(line)
        if event["event"] == "crashed":
            raise _Died(f"crashed: {event['reason']}")
        return event

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                stream.close()
        self._process = None


def _left_out(job: Job | Audit, failed: Collection[Variant], suspects: Suspects) -> dict[Variant, str]:
    """The variants that are better not launched, and why. Never the present choice: they are compared with it."""
    left = [variant for variant in job.variants if variant not in failed and not variant.is_present]
    reasons = suspects.reasons(variant.choice.tile for variant in left)
    return {variant: reasons[variant.choice.tile] for variant in left if variant.choice.tile in reasons}


class _Attempt:
    """One job in one process: what has been reported of it."""

    def __init__(self, job: Job | Audit, measured: Measured) -> None:
        self.job = job
        self.running: Variant | None = None
        self.done = False
        self._measured = measured

    def take(self, event: dict[str, Any]) -> None:
        """Note one event."""
        kind = event["event"]
        variants, measured = self.job.variants, self._measured
        if kind == "launching":
            self.running = variants[event["variant"]]
        elif kind == "failed":
            measured.failed[variants[event["variant"]]] = event["reason"]
        elif kind == "checked":
            measured.errors[variants[event["variant"]]] = event["relative_error"]
        elif kind == "round":
            for number, ms in event["ms"].items():
                measured.rounds_ms.setdefault(variants[int(number)], []).append(ms)
        elif kind == "done":
            self.done = True


def _pump(stream, events: queue.Queue[str | None]) -> None:
    """Move lines into a queue, which can be waited on with a limit; None at the end."""
    for line in stream:
        events.put(line)
    events.put(None)
