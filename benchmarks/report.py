"""Show result files: `python -m benchmarks.report FILE... --markdown | --plot | --readme`.

--markdown prints tables, --plot writes FILE.png (needs matplotlib), --readme replaces what stands in README.md between
the markers `<!-- results:NAME -->` and `<!-- /results:NAME -->` by the table of NAME.json; files without markers there
are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import machine, peers

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args(arguments)
    if not (options.markdown or options.plot or options.readme):
        parser.error("nothing to do: give --markdown, --plot or --readme")
    for file in options.files:
        result = json.loads(file.read_text())
        if options.markdown:
            print(markdown(result))
        if options.plot:
            plot(result, file.with_suffix(".png"))
        if options.readme:
            update_readme(result, file.stem, machine.ROOT / "README.md")
    return 0


# -- tables ----------------------------------------------------------------------------------------------


def markdown(result: Result) -> str:
    """The suite's table, below a line that says where it comes from."""
    return f"{_origin(result)}\n\n{_TABLES[result['suite']](result)}\n"


def _origin(result: Result) -> str:
    device, versions = result["device"], result["versions"]
    parts = [device["name"], f"commit {result['commit']}", result["date"], f"torch {versions['torch']}"]
    if result["suite"] == "compile":
        parts += [f"{device['cores']} cores", f"nvcc {result['compiler']}"]
    else:
        parts += [f"CUDA {versions['cuda']}", f"cuDNN {versions['cudnn']}", f"driver and power {device['driver']}"]
    if "matmul_tflops" in result:
        parts.append(
            "8192³ matrix product " + ", ".join(f"{value:.0f}" for value in result["matmul_tflops"]) + " TFLOP/s"
        )
    return "; ".join(parts) + "."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with the first column to the left and numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


#: Suites that compare passes of attention -> their titles.
_PASSES = {"fwd": "Forward pass", "bwd": "Backward pass", "fwd+bwd": "Forward and backward pass"}


def _pass_table(result: Result) -> str:
    names = _versions(result)
    header = ["TFLOP/s", *(peers.LABELS[name] for name in names), peers.LABELS["fa3"], "/ cuDNN", "/ front", "error"]
    rows = []
    for row in result["rows"]:
        estimate, front = row["fa3_equivalent_tflops"], row.get("front")
        error = row["results"][peers.OURS].get("max_error")
        rows.append([
            row["name"],
            *(_speed(row["results"][name]) for name in names),
            "" if estimate is None else f"{estimate:.0f}",
            _ratio(row, "cudnn"),
            "" if front is None else f"{front['ratio']:.2f} ({front['name']})",
            "" if error is None else f"{error:.1e}",
        ])  # fmt: skip
    if any("counterpart" in row for row in result["rows"]):
        header += ["/ FlashAttention-4", "time for a pair / counterpart"]
        for cells, row in zip(rows, result["rows"], strict=True):
            beside = row.get("counterpart")
            cells.append(_ratio(row, "fa4"))
            cells.append("" if beside is None else f"{beside['relative_pair_time']:.2f} ({beside['name']})")
    note = (
        "Mean of the medians of all rounds, ± half their distance. FlashAttention-3 equivalent: cuDNN here times the "
        "ratio of the two in an earlier run. Front: the best of FlashAttention-3 equivalent, cuDNN and "
        "FlashAttention-4. Error: largest difference to float64."
    )
    if peers.DETERMINISTIC in names:
        header += ["/ deterministic", "scratch, MB"]
        for cells, row in zip(rows, result["rows"], strict=True):
            scratch = row["scratch_bytes"][peers.OURS]
            cells += [_ratio(row, peers.DETERMINISTIC), "" if scratch is None else f"{scratch / 1e6:.0f}"]
        note += " Scratch: what this package's kernels are given beside inputs and results."
    return "\n\n".join([_table(header, rows), note, *_bars(result)])


def _versions(result: Result) -> list[str]:
    """This package's versions and the peers, in the order of the table."""
    own = [name for name in peers.OWN if any(name in row["results"] for row in result["rows"])]
    return [*own, *result["settings"]["peers"]]


def _ratio(row: dict[str, Any], name: str) -> str:
    return f"{row['ratios'][name]:.2f}" if name in row["ratios"] else ""


def _bars(result: Result) -> list[str]:
    """What is demanded of the suite's shapes, and whether it is reached; nothing where nothing was judged."""
    lines = [f"- {bar['bar']}: {bar['text']}: {'yes' if bar['holds'] else '**no**'}" for bar in result.get("bars", [])]
    return ["\n".join(lines)] if lines else []


def _speed(entry: dict[str, Any]) -> str:
    if "unavailable" in entry:
        return "n/a"
    wrong = " **wrong**" if entry["wrong"] else ""
    return f"{entry['tflops']:.0f} ± {entry['tflops'] * entry['spread'] / 2:.0f}{wrong}"


def _overhead_table(result: Result) -> str:
    rows = [[row["name"], "n/a" if "unavailable" in row else f"{row['us']:.1f}"] for row in result["rows"]]
    return _table(["call", "host time, us"], rows)


#: Of more kernels the table is left to the result file.
MOST_LISTED_KERNELS = 64


def _compile_table(result: Result) -> str:
    rows = [
        [
            row["name"],
            f"{row['compile_seconds']:.1f}",
            f"{row['compile_peak_bytes'] / 1e9:.2f}",
            str(row["registers"]),
            str((row["spill_store_bytes"] or 0) + (row["spill_load_bytes"] or 0)),
            f"{row['cubin_bytes'] / 1024:.0f}",
        ]
        for row in result["rows"]
    ]
    table = _table(["kernel", "s", "GB", "registers", "spilled bytes", "KiB"], rows)
    total = f"{len(rows)} kernels in {result['wall_seconds']:.0f} s, {result['settings']['jobs']} at a time"
    costs = [_compile_costs(result["rows"], family) for family in ("forward", "backward")]
    parts = ["; ".join([total, *filter(None, costs)]) + ".", *_bars(result)]
    if len(rows) > MOST_LISTED_KERNELS:
        return "\n\n".join(parts)
    return "\n\n".join([*parts, f"<details><summary>Each kernel</summary>\n\n{table}\n\n</details>"])


def _compile_costs(rows: Sequence[dict[str, Any]], family: str) -> str:
    """The worst of the kernels of a pass; empty where there is none."""
    rows = [row for row in rows if row["name"].startswith({"forward": "fwd_", "backward": "bwd_"}[family])]
    if not rows:
        return ""
    largest = max(row["compile_peak_bytes"] for row in rows) / 1e9
    slowest = max(row["compile_seconds"] for row in rows)
    return f"of the {len(rows)} {family} kernels the slowest takes {slowest:.1f} s, the largest {largest:.2f} GB"


_TABLES: dict[str, Callable[[Result], str]] = {
    **dict.fromkeys(_PASSES, _pass_table),
    "overhead": _overhead_table,
    "compile": _compile_table,
}


# -- README and plot -------------------------------------------------------------------------------------


def update_readme(result: Result, name: str, readme: Path) -> None:
    """Replace the table between the markers of `name`, if there are any."""
    begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    text = readme.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        return
    readme.write_text(pattern.sub(lambda _: f"{begin}\n{markdown(result)}{end}", text))
    print(f"updated {readme}: {name}", file=sys.stderr)


def plot(result: Result, path: Path) -> None:
    """Draw TFLOP/s over the sequence length, one panel per head dim and mask; without grouped heads."""
    if result["suite"] not in _PASSES:
        raise ValueError(f"suite {result['suite']} has no plot; only {', '.join(_PASSES)} have")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    square = [row for row in result["rows"] if row["shape"]["heads_q"] == row["shape"]["heads_kv"]]
    square = [row for row in square if "counterpart" not in row]
    head_dims = sorted({row["shape"]["head_dim"] for row in square})
    masks = sorted({row["shape"]["causal"] for row in square})
    size = (3.6 * len(head_dims), 3.0 * len(masks) + 0.8)
    figure, axes = pyplot.subplots(len(masks), len(head_dims), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, (causal, head_dim) in zip(axes.flat, itertools.product(masks, head_dims), strict=True):
        rows = [row for row in square if (row["shape"]["causal"], row["shape"]["head_dim"]) == (causal, head_dim)]
        for name in _versions(result):
            points = [(row["shape"]["seqlen"], row["results"][name].get("tflops", math.nan)) for row in rows]
            width = 2.5 if name == peers.OURS else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=peers.LABELS[name])
        axis.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylim(bottom=0)  # shared; after the last curve, since it ends autoscaling
    figure.supxlabel("sequence length")
    figure.supylabel("TFLOP/s")
    dtype = result["settings"]["dtype"].removeprefix("torch.")
    figure.suptitle(f"{_PASSES[result['suite']]}, {dtype}, {result['device']['name']}")
    axes.flat[0].legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
