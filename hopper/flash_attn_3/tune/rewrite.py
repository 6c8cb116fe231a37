"""The table after a sweep: new choices among the old ones, and where each comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..tile_table import TileChoice, TileKey, TileTable
from .choice import Decision, without_class
from .shapes import LengthClass


def updated(
    table: TileTable, key: TileKey, decisions: Sequence[tuple[LengthClass, Decision]], run: Mapping[str, Any]
) -> TileTable:
    """The table with a key's decisions; the run becomes the origin of the key's entries if it decided anything."""
    if all(decision.best is None for _, decision in decisions):
        return table
    runs = [{**other, "tuned": [name for name in other["tuned"] if name != str(key)]} for other in table.provenance]
    this = next((other for other in runs if {**other, "tuned": None} == {**run, "tuned": None}), None)
    if this is None:
        this = {**run, "tuned": []}
        runs.append(this)
    this["tuned"].append(str(key))
    choices = merge(table.choices[key], [(lengths, decision.choice) for lengths, decision in decisions])
    return TileTable(tuple(other for other in runs if other["tuned"]), {**table.choices, key: choices})


def merge(
    present: Sequence[TileChoice], decided: Iterable[tuple[LengthClass, TileChoice | None]]
) -> tuple[TileChoice, ...]:
    """The choices of one key after a sweep: the decided classes have theirs, all other lengths keep the present one.

    Neighbouring classes with the same choice become one.
    """
    decided = [(lengths, choice) for lengths, choice in decided if choice is not None]
    bounds = {choice.max_seqlen_q for choice in present}
    for lengths, _ in decided:
        bounds |= {lengths.bound, lengths.above or None}
    merged: list[TileChoice] = []
    for bound in sorted(bounds, key=lambda bound: math.inf if bound is None else bound):
        choice = dataclasses.replace(_choice_at(bound, present, decided), max_seqlen_q=bound)
        if merged and without_class(merged[-1]) == without_class(choice):
            merged.pop()
        merged.append(choice)
    return tuple(merged)


def _choice_at(
    bound: int | None, present: Sequence[TileChoice], decided: Iterable[tuple[LengthClass, TileChoice]]
) -> TileChoice:
    """What serves the lengths just up to `bound`."""
    for lengths, choice in decided:
        if lengths.bound is None if bound is None else lengths.holds(bound):
            return choice
    return present[-1] if bound is None else next(choice for choice in present if choice.holds(bound))
