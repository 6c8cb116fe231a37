"""Which tiles are worth compiling: one step along each axis, or each combination that `ForwardConfig.validate` accepts.

The axes are the fields of `ForwardTile`. An enum's values are its members; a number's are listed here or, where they
are not, its default alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import ConfigError, KernelEnum
from ..plain_data import field_types
from ..tile_table import ForwardTile, TileKey

Axes = Mapping[str, Sequence[Any]]

#: Values of the numbers among the axes. Key blocks below 48 rows never pay, above 192 they leave the output no room.
NUMBERS: dict[str, tuple[int, ...]] = {
    "block_m": (64, 128, 192, 256),
    "block_n": tuple(range(48, 193, 16)),
    "num_stages": (2, 3, 4),
    "num_q_stages": (1, 2),
    "polynomial_exp2_of_16": (0, 2, 4),
    "cluster_size": (1, 2),
}


def default_axes() -> dict[str, tuple[Any, ...]]:
    """Axis -> the values that are tried."""
    axes: dict[str, tuple[Any, ...]] = {}
    types = field_types(ForwardTile)
    for field in dataclasses.fields(ForwardTile):
        annotation = types[field.name]
        if isinstance(annotation, type) and issubclass(annotation, KernelEnum):
            axes[field.name] = tuple(annotation)
        else:
            axes[field.name] = NUMBERS.get(field.name) or (field.default,)
    return axes


def feasible_tiles(key: TileKey, axes: Axes) -> list[ForwardTile]:
    """All combinations whose kernel can be built, as far as its registers, shared memory and products tell."""
    tiles = (ForwardTile(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))
    return [tile for tile in tiles if is_feasible(key, tile)]


def is_feasible(key: TileKey, tile: ForwardTile) -> bool:
    try:
        key.config(tile).validate()
    except ConfigError:
        return False
    return True


def candidates(key: TileKey, axes: Axes, present: Iterable[ForwardTile], limit: int | None = None) -> list[ForwardTile]:
    """The tiles to measure: the present ones first, then the feasible ones, those that differ least from them first.

    Args:
        key: what the tiles serve.
        axes: the values to combine.
        present: the tiles that the table has now; always included.
        limit: how many tiles to return at most, but never fewer than the present ones.
    """
    present = list(dict.fromkeys(present))
    others = [tile for tile in feasible_tiles(key, axes) if tile not in present]
    others.sort(key=lambda tile: min((distance(tile, other) for other in present), default=(0, 0.0)))
    room = len(others) if limit is None else max(0, limit - len(present))
    return present + others[:room]


def steps_from(key: TileKey, axes: Axes, present: Iterable[ForwardTile]) -> list[ForwardTile]:
    """The present tiles, and one step from each of them along each axis."""
    present, tiles = list(present), feasible_tiles(key, axes)
    steps = [step for tile in present for step in along_axes(tile, tiles, axes).values()]
    return list(dict.fromkeys([*present, *steps]))


def along_axes(tile: ForwardTile, tiles: Iterable[ForwardTile], axes: Axes) -> dict[tuple[str, Any], ForwardTile]:
    """One step along each axis: (axis, value) -> of `tiles` the one with that value that differs least from `tile`.

    That is `tile` with this value alone changed where that can be built; else others change with it. Values that `tile`
    has itself, or that none of `tiles` has, are left out.
    """
    found: dict[tuple[str, Any], ForwardTile] = {}
    nearest = sorted(tiles, key=lambda other: distance(tile, other))
    for name, values in axes.items():
        for value in values:
            step = next((other for other in nearest if getattr(other, name) == value), None)
            if step is not None and value != getattr(tile, name):
                found[name, value] = step
    return found


def distance(first: ForwardTile, second: ForwardTile) -> tuple[int, float]:
    """In how many fields two tiles differ, and how far apart their numbers are, relatively."""
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(ForwardTile)]
    numbers = [(a, b) for a, b in pairs if not isinstance(a, KernelEnum)]
    return sum(a != b for a, b in pairs), sum(abs(a - b) / max(a, b, 1) for a, b in numbers)


def describe(key: TileKey, tile: ForwardTile) -> str:
    """One line of the dry run: what the kernel needs of what there is."""
    config = key.config(tile)
    return (
        f"{config.name}  fragments {config.fragment_registers} of {config.consumer_registers} registers, "
        f"{config.smem_bytes} bytes of shared memory"
    )


def label(tile: ForwardTile) -> str:
    """A tile in a few words, for tables."""
    values = (getattr(tile, field.name) for field in dataclasses.fields(tile))
    words = [value.slug if isinstance(value, KernelEnum) else str(value) for value in values]
    return f"{words[0]} x {words[1]}, {', '.join(words[2:])}"
