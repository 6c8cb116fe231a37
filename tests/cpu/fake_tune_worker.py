"""Stands in for the tuner's measuring process: answers jobs by a script instead of a GPU.

Usage: fake_tune_worker.py SCRIPT.json, with {"96": {"behaviour": ...}, "rescale=lazy": ...}: what variants of that
block_n, or of that value of another axis, do.
Behaviours: {"ms": 1.0}, {"wrong": "text"}, {"wrong_from": seqlen}, and {"crash_in": stage}, {"hang_in": stage},
{"raise_in": stage}, where the stage is "check", "round" or "audit"; {"unfit": "text"}: fails its audit.
The script's other keys: "dies_at_start", "crashes_before_any", "log" (a file that gets one line for each start).
"""

import json
import math
import sys
import time


def emit(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)


def perform(behaviour, stage):
    if behaviour.get("hang_in") == stage:
        time.sleep(60)
    if behaviour.get("crash_in") == stage:
        sys.exit(7)
    if behaviour.get("raise_in") == stage:
        emit("crashed", reason="AcceleratorError: illegal address")
        sys.exit(1)


def behaviour_of(tile, script):
    names = [*(f"{name}={value}" for name, value in tile.items()), str(tile["block_n"])]
    return next((script[name] for name in names if name in script), {"ms": 1.0})


def answer(job, script):
    if script.get("crashes_before_any"):
        sys.exit(3)
    behaviours = [behaviour_of(variant["choice"]["tile"], script) for variant in job["variants"]]
    if "shape" not in job:
        return audit(behaviours)
    running = {}
    for number, behaviour in enumerate(behaviours):
        emit("launching", variant=number)
        perform(behaviour, "check")
        if "wrong" in behaviour or job["shape"]["seqlen"] >= behaviour.get("wrong_from", math.inf):
            emit("failed", variant=number, reason=behaviour.get("wrong", "relative error"))
        else:
            emit("checked", variant=number, relative_error=0.003)
            running[number] = behaviour
    for _ in job["turns"]:
        for number, behaviour in running.items():
            emit("launching", variant=number)
            perform(behaviour, "round")
        emit("round", ms={str(number): behaviour.get("ms", 1.0) for number, behaviour in running.items()})
    emit("done")


def audit(behaviours):
    for number, behaviour in enumerate(behaviours):
        emit("launching", variant=number)
        perform(behaviour, "audit")
        if "unfit" in behaviour:
            emit("failed", variant=number, reason=behaviour["unfit"])
        else:
            emit("audited", variant=number)
    emit("done")


def main():
    with open(sys.argv[1]) as file:
        script = json.load(file)
    if "log" in script:
        with open(script["log"], "a") as log:
            log.write("started\n")
    if script.get("dies_at_start"):
        sys.exit(5)
    emit("ready", device={"name": "fake GPU"}, versions={"torch": "none"})
    for line in sys.stdin:
        answer(json.loads(line), script)


if __name__ == "__main__":
    main()
