"""The planner's table, forward_tiles.json: which tile, and which share of the L2 cache, serves which problem.

`python -m flash_attn_3.tune` writes the file. Reading it checks all that can be checked without a GPU, so that a
mistake shows when the planner is first asked, not when a rare problem comes along.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import (
    WARPGROUP_ROWS,
    Dtype,
    ForwardConfig,
    Mask,
    OutputBuffer,
    Rescale,
    Schedule,
    Score,
    SeqLayout,
    head_dims_slug,
)
from .plain_data import field_types, from_plain, parse, to_plain

#: The file that the planner reads.
TABLE_FILE = Path(__file__).with_name("forward_tiles.json")
#: (head_dim tile, head_dim_v tile) of the kernels that exist; the table has entries for each.
HEAD_DIM_PAIRS = ((64, 64), (64, 128), (64, 256), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


class TileTableError(ValueError):
    """The table cannot be used; the text names the file, the entry and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """The tunable part of a `ForwardConfig`: all of its fields that the problem does not decide."""

    block_m: int
    block_n: int
    num_stages: int = 2
    schedule: Schedule = Schedule.BOTH
    rescale: Rescale = Rescale.EAGER
    output_buffer: OutputBuffer = OutputBuffer.OWN
    num_q_stages: int = 2
    polynomial_exp2_of_16: int = 0
    cluster_size: int = 1

    @classmethod
    def of(cls, config: ForwardConfig) -> ForwardTile:
        """The tunable part of a configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def of_one_cta(self) -> ForwardTile:
        """The tile without a cluster."""
        return dataclasses.replace(self, cluster_size=1)

    def of_one_warpgroup(self) -> ForwardTile:
        """The tile with as few rows as there can be, for launches of so few rows that others would idle."""
        return dataclasses.replace(self, block_m=WARPGROUP_ROWS, schedule=Schedule.INTRA_WARPGROUP, cluster_size=1)


@dataclasses.dataclass(frozen=True)
class TileKey:
    """What decides on a tile beside the length; the head dims are tile widths."""

    head_dim: int
    head_dim_v: int
    mask: Mask
    score: Score

    def config(
        self, tile: ForwardTile, dtype: Dtype = Dtype.BF16, seq_layout: SeqLayout = SeqLayout.DENSE
    ) -> ForwardConfig:
        """The kernel that serves these problems with a tile, not validated."""
        fields = {field.name: getattr(tile, field.name) for field in dataclasses.fields(tile)}
        return ForwardConfig(
            dtype=dtype,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            mask=self.mask,
            seq_layout=seq_layout,
            score=self.score,
            **fields,
        )

    def configs(self, tile: ForwardTile) -> list[ForwardConfig]:
        """All kernels that a tile comes down to: one for each dtype and layout."""
        return [self.config(tile, dtype, layout) for dtype, layout in itertools.product(Dtype, SeqLayout)]

    def __str__(self) -> str:
        return f"{head_dims_slug(self.head_dim, self.head_dim_v)} {self.mask.slug} {self.score.slug}"


@dataclasses.dataclass(frozen=True)
class TileChoice:
    """What serves one class of lengths.

    Attributes:
        max_seqlen_q: the longest query sequence of the class; None: any.
        tile: the tile.
        l2_kv_bytes: keys and values of the heads worked on together are at most this many bytes (at least one head's),
            so that they stay in the L2 cache. It has 50 MB, in two halves that each hold what their own
            multiprocessors read.
    """

    max_seqlen_q: int | None
    tile: ForwardTile
    l2_kv_bytes: int

    def holds(self, seqlen_q: int) -> bool:
        return self.max_seqlen_q is None or seqlen_q <= self.max_seqlen_q


@dataclasses.dataclass(frozen=True)
class TileTable:
    """All choices, and where they come from.

    Attributes:
        provenance: one mapping per run of the tuner: commit, date, device, versions, command, and, under "tuned",
            the keys whose entries it made.
        choices: for each key its length classes, the shortest first, the last one unbounded.
    """

    provenance: tuple[Mapping[str, Any], ...]
    choices: Mapping[TileKey, tuple[TileChoice, ...]]

    def choice(self, key: TileKey, seqlen_q: int) -> TileChoice:
        """What serves problems whose longest query sequence has ``seqlen_q`` rows."""
        return next(choice for choice in self.choices[key] if choice.holds(seqlen_q))

    def check(self) -> None:
        """Raise `TileTableError` unless every problem finds exactly one choice, whose kernels can be built."""
        wanted = [TileKey(*dims, mask, score) for dims, mask, score in itertools.product(HEAD_DIM_PAIRS, Mask, Score)]
        for key in wanted:
            if not self.choices.get(key):
                raise TileTableError(f"there is no entry for {key}")
        for key, choices in self.choices.items():
            if key not in wanted:
                raise TileTableError(f"{key}: no kernel has these head dims; they must be among {HEAD_DIM_PAIRS}")
            _check_bounds(key, choices)
            for choice in choices:
                _check_choice(key, choice)


def _check_bounds(key: TileKey, choices: Sequence[TileChoice]) -> None:
    bounds = [choice.max_seqlen_q for choice in choices]
    if bounds[-1] is not None:
        raise TileTableError(f"{key}: the last entry has max_seqlen_q={bounds[-1]}; it must be null, for all lengths")
    if None in bounds[:-1]:
        raise TileTableError(f"{key}: an entry before the last has max_seqlen_q=null; it must be an integer")
    if any(bound < 1 for bound in bounds[:-1]):
        raise TileTableError(f"{key}: max_seqlen_q={min(bounds[:-1])} is not supported; it must be positive")
    if any(first >= second for first, second in itertools.pairwise(bounds[:-1])):
        raise TileTableError(f"{key}: max_seqlen_q={bounds} is not supported; it must rise from entry to entry")


def _check_choice(key: TileKey, choice: TileChoice) -> None:
    where = f"{key}, max_seqlen_q={choice.max_seqlen_q}"
    try:
        key.config(choice.tile).validate()
    except ValueError as error:
        raise TileTableError(f"{where}: {error}") from error
    if choice.l2_kv_bytes < 1:
        raise TileTableError(f"{where}: l2_kv_bytes={choice.l2_kv_bytes} is not supported; it must be positive")


# -- the file --------------------------------------------------------------------------------------------------------


@functools.cache
def forward_tiles() -> TileTable:
    """The table of the installed package, read once."""
    return read(TABLE_FILE)


def read(path: Path) -> TileTable:
    """A table from a file.

    Raises:
        TileTableError: the file cannot be read or does not hold a complete and valid table.
    """
    try:
        return parse_table(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise TileTableError(f"{path}: {error}") from error


def write(table: TileTable, path: Path) -> None:
    """Write a table, one run and one entry a line; a reader sees the old file or the new one."""
    table.check()
    entries = [
        {**to_plain(key), "max_seqlen_q": choice.max_seqlen_q, **plain_choice(choice)}
        for key, choices in table.choices.items()
        for choice in choices
    ]
    lists = {"provenance": table.provenance, "entries": entries}
    parts = (f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for name, rows in lists.items())
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def parse_table(content: Any) -> TileTable:
    """A table from the content of a file. Raises `TileTableError`."""
    lists = ("provenance", "entries")
    if not isinstance(content, dict) or set(content) != set(lists) or not all(type(content[x]) is list for x in lists):
        raise TileTableError("it must be an object with the lists 'provenance' and 'entries'")
    choices: dict[TileKey, list[TileChoice]] = {}
    for number, entry in enumerate(content["entries"]):
        try:
            if not isinstance(entry, dict):
                raise ValueError("it must be an object")
            key, choice = _parse_entry(entry)
        except ValueError as error:
            raise TileTableError(f"entry {number}, {_shown(entry)}: {error}") from error
        choices.setdefault(key, []).append(choice)
    table = TileTable(tuple(content["provenance"]), {key: tuple(group) for key, group in choices.items()})
    table.check()
    return table


def plain_choice(choice: TileChoice) -> dict[str, Any]:
    """A choice as the file has it, without its class of lengths."""
    return {"tile": to_plain(choice.tile), "l2_kv_bytes": choice.l2_kv_bytes}


def _parse_entry(entry: dict[str, Any]) -> tuple[TileKey, TileChoice]:
    names = ("max_seqlen_q", "tile", "l2_kv_bytes")
    missing = [name for name in names if name not in entry]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    bound, tile, l2_kv_bytes = (entry[name] for name in names)
    key = from_plain(TileKey, {name: value for name, value in entry.items() if name not in names})
    if bound is not None:
        bound = parse("max_seqlen_q", bound, int)
    return key, TileChoice(bound, from_plain(ForwardTile, tile), parse("l2_kv_bytes", l2_kv_bytes, int))


def _shown(entry: Any) -> str:
    names = [*field_types(TileKey), "max_seqlen_q"] if isinstance(entry, dict) else []
    return ", ".join(f"{name}={entry[name]}" for name in names if name in entry) or repr(entry)
