"""What kernels that hang or crash have in common: a value of an axis with which none has run."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from ..tile_table import ForwardTile

#: So many kernels must die with a value before it is suspected: one may have died of something else.
LEAST_DEATHS = 2
#: How the reasons begin.
LEFT_OUT = "left out"


class Suspects:
    """The fates of a key's tiles so far.

    A kernel that hangs costs seconds and the measuring process. A value that is broken is in thousands of candidates,
    the rest of which need not die of it.
    """

    def __init__(self) -> None:
        self._dead: set[ForwardTile] = set()
        self._right: set[ForwardTile] = set()

    def died(self, tile: ForwardTile) -> None:
        """A kernel of this tile hung or crashed, on whatever call."""
        self._dead.add(tile)

    def was_right(self, tile: ForwardTile) -> None:
        """A kernel of this tile ended, with right results. It may still die later, which counts for more."""
        self._right.add(tile)

    def reasons(self, tiles: Iterable[ForwardTile]) -> dict[ForwardTile, str]:
        """Which of these are better not launched, and why: a value that they share with the dead and with no other."""
        alive = {value for tile in self._right - self._dead for value in _values(tile)}
        deaths = collections.Counter(value for tile in self._dead for value in _values(tile) if value not in alive)
        suspected = {value for value, count in deaths.items() if count >= LEAST_DEATHS}
        shared = {tile: next((value for value in _values(tile) if value in suspected), None) for tile in tiles}
        return {tile: _reason(value, deaths[value]) for tile, value in shared.items() if value is not None}


def _values(tile: ForwardTile) -> list[tuple[str, Any]]:
    return [(field.name, getattr(tile, field.name)) for field in dataclasses.fields(tile)]


def _reason(value: tuple[str, Any], deaths: int) -> str:
    name, shown = value[0], getattr(value[1], "slug", value[1])
    return f"{LEFT_OUT}: {deaths} tiles with {name}={shown} hung or crashed, none was right"
