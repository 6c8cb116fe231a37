"""Measure the tiles that kernels can have, and write the planner's table.

    python -m flash_attn_3.tune --dry-run --head-dim 128 --mask causal       list the candidates
    python -m flash_attn_3.tune --compile-only --kernels DIR                 compile the first; needs no GPU
    python -m flash_attn_3.tune --kernels DIR --report FILE                  measure them and update the table

From the table's present tiles one step along each axis is compiled; the results are checked; what is right is timed in
turns with the present choice; and then one step along each axis from the fastest, until it stays the fastest. With
--exhaustive every combination that can be built is compiled at once. The present choice is replaced only where another
is faster by more than the spread of the measurement.
A sweep may be made in parts: a run changes what it measured and keeps the rest of the table and of the report.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import environment, tile_table
from ..config import Mask, Score
from ..errors import CacheError
from ..plain_data import field_types, parse
from ..tile_table import HEAD_DIM_PAIRS, TABLE_FILE, ForwardTile, TileKey, TileTable
from . import report
from .build import build
from .candidates import Axes, candidates, default_axes, describe, steps_from
from .process import Worker, WorkerError
from .rewrite import updated
from .shapes import length_classes
from .sweep import Effort, KeyResult, KeySweep

ROOT = Path(__file__).resolve().parents[3]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_3.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_what(parser.add_argument_group("what is tuned; default: everything but capped scores"))
    _add_axes(parser.add_argument_group("values of the axes that are combined"))
    _add_how(parser.add_argument_group("how it is measured"))
    parser.add_argument("--dry-run", action="store_true", help="only list the candidates and what they need")
    parser.add_argument("--compile-only", action="store_true", help="only compile the candidates")
    parser.add_argument("--kernels", type=Path, metavar="DIR", help="folder of kernels; default: the user's cache")
    parser.add_argument("--jobs", type=_positive, help="compilers at once; default: what cores and memory allow")
    parser.add_argument("--table", type=Path, default=TABLE_FILE, metavar="FILE", help="default: the package's own")
    parser.add_argument("--report", type=Path, default=Path("tune.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--commit", metavar="TEXT", help="names the measured sources where this is no git clone")
    return parser.parse_args(arguments)


def _add_what(group: argparse._ArgumentGroup) -> None:
    head_dims, head_dims_v = (sorted(set(dims)) for dims in zip(*HEAD_DIM_PAIRS, strict=True))
    masks, scores = ([member.slug for member in enum] for enum in (Mask, Score))
    group.add_argument("--head-dim", type=int, nargs="+", choices=head_dims, default=head_dims, metavar="D")
    group.add_argument("--head-dim-v", type=int, nargs="+", choices=head_dims_v, default=head_dims_v, metavar="D")
    group.add_argument("--mask", nargs="+", choices=masks, default=masks)
    group.add_argument("--score", nargs="+", choices=scores, default=["scaled"])
    _add_counts(group, "--lengths", [512, 1024, 2048, 4096, 8192, 16384], "of the sequences that are measured")
    _add_counts(group, "--class-bounds", [1024, 4096], "lengths at which one entry of the table ends", nargs="*")
    group.add_argument("--exhaustive", action="store_true", help="every combination of the axes: thousands of a kind")
    group.add_argument("--limit", type=_positive, metavar="N", help="most of those: the nearest to the present tiles")


def _add_counts(
    group: argparse._ArgumentGroup, name: str, default: int | list[int], text: str, nargs: str = "+"
) -> None:
    """An option with one positive integer, or with several if its default has several."""
    several = isinstance(default, list)
    shown = " ".join(map(str, default)) if several else default
    options = {"nargs": nargs} if several else {}
    group.add_argument(name, type=_positive, default=default, metavar="N", help=f"{text}; default: {shown}", **options)


def _natural(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"got {word!r}; it must be an integer from 0 on")
    return int(word)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}; it must be a positive integer")
    return int(word)


def _add_axes(group: argparse._ArgumentGroup) -> None:
    for name, values in default_axes().items():
        shown = " ".join(str(getattr(value, "slug", value)) for value in values)
        group.add_argument(f"--{name.replace('_', '-')}", nargs="+", metavar="X", help=f"default: {shown}")


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--l2-mb", type=float, nargs="*", default=[2, 4, 8, 16, 32], metavar="MB", help="not for full masks"
    )
    group.add_argument(
        "--steps", type=_natural, default=3, metavar="N", help="most steps from the first tiles; default: 3"
    )
    _add_counts(group, "--finalists", 3, "tiles measured again, with every L2 budget")
    _add_counts(group, "--warm-up", 1, "launches before the first turn")
    _add_counts(group, "--heat-turns", [2, 4], "turns in each round of a heat")
    _add_counts(group, "--rounds", 3, "rounds of a final, at least 2")
    _add_counts(group, "--turns", 6, "turns in each round of a final")
    group.add_argument("--drop-behind", type=float, default=0.15, help="left out after the first round; default: 0.15")
    group.add_argument("--timeout", type=float, default=20.0, help="seconds without a sign of life; default: 20")
    group.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no shape is begun")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 if the sweep cannot run as asked, 1 if a class could not be decided."""
    started = time.monotonic()
    options = _parse(arguments)
    try:
        if options.rounds < 2:
            raise ValueError(f"--rounds: got {options.rounds}; it must be at least 2, since one round has no spread")
        if options.limit is not None and not options.exhaustive:
            raise ValueError(f"--limit: got {options.limit}; it must come with --exhaustive")
        table = tile_table.read(options.table)
        tiles = {key: _first_tiles(options, key, table) for key in _keys(options)}
        keys = list(tiles)
        if options.dry_run:
            print("\n".join(describe(key, tile) for key in keys for tile in tiles[key]))
            return 0
        if options.compile_only:
            build([key.config(tile) for key in keys for tile in tiles[key]], options.kernels, options.jobs)
            return 0
        return _sweep(
            options, table, tiles, _effort(options, started), _command(sys.argv[1:] if arguments is None else arguments)
        )
    except (ValueError, CacheError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _keys(options: argparse.Namespace) -> list[TileKey]:
    dims = [(d, v) for d, v in HEAD_DIM_PAIRS if d in options.head_dim and v in options.head_dim_v]
    masks = [mask for mask in Mask if mask.slug in options.mask]
    scores = [score for score in Score if score.slug in options.score]
    return [TileKey(d, v, mask, score) for (d, v), mask, score in itertools.product(dims, masks, scores)]


def _axes(options: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """The default axes with those values replaced that the command line names."""
    axes = default_axes()
    for name, annotation in field_types(ForwardTile).items():
        words = getattr(options, name)
        if words is not None:
            values = (int(word) if annotation is int and word.isdecimal() else word for word in words)
            axes[name] = tuple(parse(name, value, annotation) for value in values)
    return axes


def _first_tiles(options: argparse.Namespace, key: TileKey, table: TileTable) -> list[ForwardTile]:
    """What is compiled before anything is measured."""
    present = [choice.tile for choice in table.choices[key]]
    if options.exhaustive:
        return candidates(key, _axes(options), present, options.limit)
    return steps_from(key, _axes(options), present)


def _effort(options: argparse.Namespace, started: float) -> Effort:
    return Effort(
        lengths=tuple(sorted(set(options.lengths))),
        classes=tuple(length_classes(options.class_bounds)),
        steps=0 if options.exhaustive else options.steps,
        finalists=options.finalists,
        l2_budgets=tuple(round(megabytes * report.MEGABYTE) for megabytes in options.l2_mb),
        warm_up=options.warm_up,
        heat_turns=tuple(options.heat_turns),
        rounds=options.rounds,
        turns=options.turns,
        drop_behind=options.drop_behind,
        deadline=started + options.time_limit,
    )


def _neighbours(key: TileKey, axes: Axes, tile: ForwardTile) -> list[ForwardTile]:
    return steps_from(key, axes, [tile])


def _command(arguments: Sequence[str]) -> str:
    """The command line, without the options that have no influence on the outcome, such as paths."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("--kernels", "--table", "--report", "--commit", "--jobs", "--timeout", "--time-limit"):
        parser.add_argument(name)
    return shlex.join(["python", "-m", "flash_attn_3.tune", *parser.parse_known_args(arguments)[1]])


def _sweep(
    options: argparse.Namespace,
    table: TileTable,
    tiles: dict[TileKey, list[ForwardTile]],
    effort: Effort,
    command: str,
) -> int:
    """Tune key after key; table and report are written after each, so that an interrupted sweep keeps what it has."""
    results: list[KeyResult] = []
    run = {"commit": options.commit or environment.commit(ROOT), "date": environment.date()}
    compile_them = functools.partial(build, folder=options.kernels, jobs=options.jobs)
    with Worker(options.timeout) as worker:
        for key, candidates_of_key in tiles.items():
            if time.monotonic() > effort.deadline:
                print(f"{key}: not begun, the time is over", file=sys.stderr)
                continue
            neighbours = functools.partial(_neighbours, key, _axes(options))
            sweep = KeySweep(key, candidates_of_key, table, compile_them, worker, effort, options.kernels, neighbours)
            results.append(sweep.run())
            run |= {"device": worker.device, "versions": worker.versions, "command": command}
            table = updated(table, key, results[-1].decisions, run)
            tile_table.write(table, options.table)
            report.update(options.report, run, results[-1:])
            for lengths, decision in results[-1].decisions:
                print(f"{key}, {lengths}: {decision.reason} ({decision.ratio:.3f})", file=sys.stderr, flush=True)
    is_complete = len(results) == len(tiles) and all(
        decision.best is not None for result in results for _, decision in result.decisions
    )
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
