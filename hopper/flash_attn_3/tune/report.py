"""The report of a sweep: a JSON file with every candidate and every time, and a Markdown summary beside it.

A later run replaces the keys that it measured and keeps the others, so that a sweep can be made in parts. In the file,
a candidate is named by its number among its key's candidates.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plain_data import to_plain
from ..tile_table import ForwardTile, TileChoice, TileKey
from .build import spilled_bytes
from .candidates import label
from .choice import Decision, geometric_mean
from .shapes import LengthClass
from .suspects import LEFT_OUT
from .sweep import KeyResult, ShapeResult

MEGABYTE = 2**20


def update(path: Path, run: Mapping[str, Any], results: Sequence[KeyResult]) -> None:
    """Put the results into the report at `path`, with the run that they come from, and write the summary anew."""
    keys = json.loads(path.read_text())["keys"] if path.exists() else []
    fresh = [{"key": str(result.key), "run": dict(run), **_key_rows(result)} for result in results]
    replaced = {row["key"] for row in fresh}
    content = {"suite": "tune", "keys": [row for row in keys if row["key"] not in replaced] + fresh}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact(content))
    path.with_suffix(".md").write_text(markdown(content))


def _compact(content: Mapping[str, Any]) -> str:
    """JSON with a line for each row of a key's lists."""
    keys = []
    for row in content["keys"]:
        parts = []
        for name, value in row.items():
            rows = [f"    {json.dumps(element)}" for element in value] if isinstance(value, list) else []
            shown = "[\n" + ",\n".join(rows) + "\n   ]" if rows else json.dumps(value)
            parts.append(f"   {json.dumps(name)}: {shown}")
        keys.append("  {\n" + ",\n".join(parts) + "\n  }")
    return f'{{\n "suite": {json.dumps(content["suite"])},\n "keys": [\n' + ",\n".join(keys) + "\n ]\n}\n"


def _key_rows(result: KeyResult) -> dict[str, Any]:
    numbers = {tile: number for number, tile in enumerate(result.tiles)}
    return {
        "candidates": [_candidate_row(result, tile) for tile in result.tiles],
        "shapes": [_shape_row(shape, numbers) for shape in result.shapes],
        "choices": [_decision_row(result.key, *decision, numbers) for decision in result.decisions],
    }


def _candidate_row(result: KeyResult, tile: ForwardTile) -> dict[str, Any]:
    config = result.key.config(tile)
    kernel = result.built.kernels.get(config)
    row: dict[str, Any] = {**to_plain(tile), "smem_bytes": config.smem_bytes}
    if kernel is not None:
        row |= {"registers": kernel.meta["registers"], "spilled_bytes": spilled_bytes(kernel)}
        row |= {"compile_seconds": round(kernel.meta["compile_seconds"], 2)}
    if config in result.built.dropped:
        row["dropped"] = result.built.dropped[config]
    return row


def _shape_row(result: ShapeResult, numbers: Mapping[ForwardTile, int]) -> dict[str, Any]:
    def name(choice: TileChoice) -> dict[str, Any]:
        return {"candidate": numbers[choice.tile], "l2_mb": choice.l2_kv_bytes / MEGABYTE}

    times = [
        {**name(choice), "rounds_ms": [round(ms, 5) for ms in rounds], "error": float(f"{result.errors[choice]:.1e}")}
        for choice, rounds in result.times.rounds_ms.items()
    ]
    row = {"shape": str(result.shape), "stage": result.stage, "present": name(result.times.present), "times": times}
    row["failed"] = [{**name(choice), "reason": reason} for choice, reason in result.failed.items()]
    return row | ({"abandoned": result.abandoned} if result.abandoned else {})


def _decision_row(
    key: TileKey, lengths: LengthClass, decision: Decision, numbers: Mapping[ForwardTile, int]
) -> dict[str, Any]:
    best = decision.best
    return {
        "lengths": str(lengths),
        "best": None if best is None else {"candidate": numbers[best.tile], "l2_mb": best.l2_kv_bytes / MEGABYTE},
        "label": None if best is None else label(best.tile),
        "kernel": None if best is None else key.config(best.tile).name,
        "ratio": None if math.isnan(decision.ratio) else round(decision.ratio, 4),
        "spread": None if math.isnan(decision.spread) else round(decision.spread, 4),
        "replaced": decision.choice is not None,
        "reason": decision.reason,
    }


# -- summary ---------------------------------------------------------------------------------------------------------


def markdown(content: Mapping[str, Any]) -> str:
    """One table row for each class of lengths, and where the figures come from."""
    header = "| kernels | lengths | fastest | L2, MB | time / present | spread | outcome |"
    lines = ["# What the tuner measured", "", header, "|---|---|---|---:|---:|---:|---|"]
    lines += [_choice_line(row["key"], choice) for row in content["keys"] for choice in row["choices"]]
    ratios = [choice["ratio"] for row in content["keys"] for choice in row["choices"] if choice["replaced"]]
    ratios = [ratio for ratio in ratios if ratio is not None]
    if ratios:
        lines += ["", f"{len(ratios)} choices replaced; geometric mean of their times: {geometric_mean(ratios):.3f}."]
    lines += ["", "Candidates:", ""]
    lines += [f"- {row['key']}: {_count(row)}; {_origin(row['run'])}" for row in content["keys"]]
    return "\n".join(lines) + "\n"


def _choice_line(key: str, choice: Mapping[str, Any]) -> str:
    if choice["best"] is None:
        cells = ["", "", "", ""]
    else:
        figures = [f"{choice[name]:.3f}" if choice[name] is not None else "" for name in ("ratio", "spread")]
        cells = [choice["label"], f"{choice['best']['l2_mb']:g}", *figures]
    outcome = "replaced" if choice["replaced"] else "kept"
    return f"| {key} | {choice['lengths']} | {' | '.join(cells)} | {outcome}: {choice['reason']} |"


def _count(row: Mapping[str, Any]) -> str:
    dropped = [candidate["dropped"].split()[0] for candidate in row["candidates"] if "dropped" in candidate]
    counts = [f"{dropped.count(word)} {meaning}" for word, meaning in _DROPPED.items() if word in dropped]
    reasons = {failure["candidate"]: failure["reason"] for shape in row["shapes"] for failure in shape["failed"]}
    left_out = [reason for reason in reasons.values() if reason.startswith(LEFT_OUT)]
    failed = len(reasons) - len(left_out)
    counts += [f"{failed} wrong, hung or crashed"] if failed else []
    counts += [f"{count} {reason}" for reason, count in collections.Counter(left_out).items()]
    return ", ".join([f"{len(row['candidates'])} in all", *counts])


#: First word of the reason for dropping a kernel -> what the summary calls it.
_DROPPED = {"spills": "spilled", "does": "did not compile", "not": "not built", "unfit:": "unfit for other calls"}


def _origin(run: Mapping[str, Any]) -> str:
    return f"{run['device']}, commit {run['commit']}, {run['date']}"
