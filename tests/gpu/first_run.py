"""For a GPU, a driver or a toolkit that has not run the kernels yet: calls from the simplest to the hardest; at the end
those by tiles that only the tuner tries.

    python -m tests.gpu.first_run

A wrong barrier hangs a kernel for good, and with it a suite of tests. Here a process takes one step after the other;
one that says nothing for `DEADLINE` seconds is stopped, and a new one goes on behind the step at fault. The first step
that fails has what the ones before it have not. Exits with 1 where one fails.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import torch

from .cases import Case, GradientCase
from .sanitizer_gradients import run_case as run_gradient_case
from .sanitizer_subset import run_case
from .tiles import TileCase, cases_along_axes, run_tile_case

#: Seconds, with a kernel's compilation and the process's start.
DEADLINE = 90.0
COMMAND = (sys.executable, "-m", "tests.gpu.first_run", "--from")

ONE_TILE = {"batch": 1, "heads_q": 1, "heads_kv": 1, "seqlen_q": 64, "seqlen_k": 64}
ONE_BLOCK_OF_KEYS = {**ONE_TILE, "seqlen_q": 1000}
SEVERAL_TILES = {**ONE_TILE, "seqlen_q": 500, "seqlen_k": 1000}
#: More than one for each multiprocessor.
MANY_TILES = {"batch": 4, "heads_q": 16, "heads_kv": 4, "seqlen_q": 1000, "seqlen_k": 1000}
DENSE = {"batch": 1, "heads_q": 4, "heads_kv": 2}
PACKED = {"lens_q": (70, 0, 500, 3), "lens_k": (130, 5, 700, 0), "heads_q": 2, "heads_kv": 1}
#: Made by tiles with each value of each axis of the tuner's, which differ from the table's tile in as little as can be.
CALLS = {
    "ragged tails": {**DENSE, "seqlen_q": 300, "seqlen_k": 450},
    "large scores": {**DENSE, "seqlen_q": 300, "seqlen_k": 450, "softmax_scale": 20.0},
    "packed sequences": {**PACKED, "heads_q": 4, "causal": True},
    "NaN in a key": {**DENSE, "seqlen_q": 300, "seqlen_k": 450, "causal": True, "nan_keys": (200,)},
}
#: Head dims of those calls: the last one that has a tile with the value.
AXES_HEAD_DIMS = (64, 128)
#: (head_dim, head_dim_v), each of which the backward pass computes in another way.
WAYS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256))

STEPS: dict[str, Case] = {
    "forward, one tile": Case(64, **ONE_TILE),
    "forward, several tiles": Case(64, **SEVERAL_TILES),
    "forward, head dim 128": Case(128, **SEVERAL_TILES),
    "forward, head dim 256": Case(256, **SEVERAL_TILES),
    "forward, causal, more tiles than multiprocessors": Case(128, **MANY_TILES, causal=True),
    "forward, window": Case(128, **MANY_TILES, window_size=(300, 0)),
    "forward, packed sequences": Case(128, **PACKED, causal=True),
    **{
        f"backward, head dims {d}, {dv}, {what}": GradientCase(d, dv, **sizes)
        for d, dv in WAYS
        for what, sizes in {
            "one tile": ONE_TILE,
            "several blocks of queries": ONE_BLOCK_OF_KEYS,
            "several blocks of keys": SEVERAL_TILES,
            "causal, more tiles than multiprocessors": {**MANY_TILES, "causal": True},
            "several blocks of keys in order": {**SEVERAL_TILES, "deterministic": True},
            "causal, more tiles than multiprocessors in order": {**MANY_TILES, "causal": True, "deterministic": True},
            "packed sequences": {**PACKED, "causal": True},
            "window, packed sequences in order": {**PACKED, "window_size": (100, 50), "deterministic": True},
        }.items()
    },
    **{
        f"tile with {name}, {what}": case
        for what, options in CALLS.items()
        for d in AXES_HEAD_DIMS
        for name, case in cases_along_axes(Case(d, **options)).items()
    },
}
_RUN = {Case: run_case, GradientCase: run_gradient_case, TileCase: run_tile_case}


def take_steps(command: Sequence[str], num_steps: int, deadline: float) -> Iterator[tuple[int, str]]:
    """(step, what came of it), each as soon as it is known; "" for a step that went well.

    Args:
        command: with the number of a step behind it, a process that takes the steps from that one on. Of step 3, say,
            it prints the lines "begin 3", and "3 " with what came of it behind. It may end between two steps.
        num_steps: of the command.
        deadline: seconds after which a process that prints nothing is stopped.
    """
    step = 0
    while step < num_steps:
        for outcome in _take_some([*command, str(step)], step, deadline):
            yield step, outcome
            step += 1
            if step == num_steps:
                break


def _take_some(command: Sequence[str], step: int, deadline: float) -> Iterator[str]:
    """What came of the steps that one process takes, the last of which it may not have survived."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        is_between_steps = False
        try:
            while (line := lines.get(timeout=deadline)) is not None:
                first, blank, rest = line.rstrip("\n").partition(" ")
                if (first, rest) == ("begin", str(step)):
                    is_between_steps = False
                elif blank and first == str(step):
                    yield rest
                    step, is_between_steps = step + 1, True
            death = f"crashed with exit code {process.wait()}"
        except queue.Empty:
            death = f"hung: nothing for {deadline:.0f} s"
        finally:
            process.kill()
        if not is_between_steps:
            yield death


def _pump(stream: Iterator[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def run_steps(begin: int) -> None:
    """What the process does. After a failure of the device it ends, since nothing works there any more."""
    for number, case in list(enumerate(STEPS.values()))[begin:]:
        _say(f"begin {number}")
        outcome = ""
        try:
            _RUN[type(case)](case)
        except AssertionError as error:
            outcome = f"wrong: {_first_line(error)}"
        except Exception as error:
            outcome = f"failed: {type(error).__name__}: {_first_line(error)}"
        _say(f"{number} {outcome}")
        if outcome.startswith("failed"):
            sys.exit(1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--from"]:
        return run_steps(int(arguments[1]))
    if not torch.cuda.is_available():
        raise SystemExit("tests.gpu.first_run needs a Hopper GPU; torch sees no CUDA device")
    names = list(STEPS)
    num_failed = 0
    for step, outcome in take_steps(COMMAND, len(names), DEADLINE):
        _say(f"{step + 1:3}/{len(names)} {outcome or 'ok'}: {names[step]}")
        num_failed += outcome != ""
    _say(f"{len(names) - num_failed} of {len(names)} steps went well")
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
