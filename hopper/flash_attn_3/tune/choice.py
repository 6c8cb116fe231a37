"""Times -> choices: how tiles rank, and which choice a class of lengths gets."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..tile_table import ForwardTile, TileChoice


@dataclasses.dataclass(frozen=True)
class ShapeTimes:
    """One shape: milliseconds per round of each choice, and which one the table has now.

    Choices are compared without their class of lengths: `max_seqlen_q` is None in all of them. One that was left out as
    slow has fewer rounds than the others.
    """

    present: TileChoice
    rounds_ms: Mapping[TileChoice, Sequence[float]]

    @property
    def num_rounds(self) -> int:
        return max(map(len, self.rounds_ms.values()), default=0)

    def is_complete(self, choice: TileChoice) -> bool:
        """Whether a choice was measured in every round."""
        return self.num_rounds > 0 and len(self.rounds_ms.get(choice, ())) == self.num_rounds

    def without(self, tiles: Collection[ForwardTile]) -> ShapeTimes:
        """The same without the challengers of these tiles."""
        kept = {c: rounds for c, rounds in self.rounds_ms.items() if c.tile not in tiles or c == self.present}
        return dataclasses.replace(self, rounds_ms=kept)

    def relative(self, choice: TileChoice) -> float:
        """The choice's time in units of the fastest one's."""
        means = {other: statistics.mean(rounds) for other, rounds in self.rounds_ms.items() if rounds}
        return means[choice] / min(means.values())


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a class of lengths gets.

    Attributes:
        choice: the new choice, or None: the present one stays.
        best: the fastest choice, None if nothing was measured.
        ratio: its time over the present choice's, as a geometric mean over the shapes; NaN if there is none.
        spread: how much that ratio varied between rounds.
        reason: why.
    """

    choice: TileChoice | None
    best: TileChoice | None
    ratio: float
    spread: float
    reason: str


def without_class(choice: TileChoice) -> TileChoice:
    return dataclasses.replace(choice, max_seqlen_q=None)


def ranking(shapes: Sequence[ShapeTimes]) -> list[ForwardTile]:
    """The tiles that were right on each shape, the fastest over all of them first, by geometric mean."""
    common = set.intersection(*({c for c, rounds in shape.rounds_ms.items() if rounds} for shape in shapes))
    ranked = sorted(
        (choice for choice in shapes[0].rounds_ms if choice in common),
        key=lambda choice: geometric_mean(shape.relative(choice) for shape in shapes),
    )
    return list(dict.fromkeys(choice.tile for choice in ranked))


def decide(shapes: Sequence[ShapeTimes]) -> Decision:
    """Choose for one class: the fastest over all shapes, if it beats the present choice by more than the spread.

    The rounds of all choices are interleaved, so the ratio of two within a round is free of the card's changing clock.
    How much it differs from round to round is the spread, which a challenger has to beat.
    """
    eligible = [c for c in (shapes[0].rounds_ms if shapes else ()) if all(shape.is_complete(c) for shape in shapes)]
    if not eligible:
        return Decision(None, None, math.nan, math.nan, "no choice was measured on every shape")
    if not all(shape.is_complete(shape.present) for shape in shapes):
        best = min(eligible, key=lambda choice: geometric_mean(shape.relative(choice) for shape in shapes))
        return Decision(best, best, math.nan, math.nan, "the present choice failed")
    ratios = {choice: _ratio(choice, shapes) for choice in eligible}
    gains = [choice for choice, (ratio, spread) in ratios.items() if 1.0 - ratio > spread]
    best = min(gains or eligible, key=lambda choice: (ratios[choice][0], choice != shapes[0].present))
    if gains:
        return Decision(best, best, *ratios[best], "faster than the present choice")
    is_present = all(best == shape.present for shape in shapes)
    reason = "the present choice is the fastest" if is_present else "the gain is within the spread"
    return Decision(None, best, *ratios[best], reason)


def _ratio(choice: TileChoice, shapes: Sequence[ShapeTimes]) -> tuple[float, float]:
    """Time over the present choice's: geometric mean over shapes and rounds, and its range over the rounds."""
    rounds = [
        geometric_mean(shape.rounds_ms[choice][number] / shape.rounds_ms[shape.present][number] for shape in shapes)
        for number in range(min(shape.num_rounds for shape in shapes))
    ]
    return geometric_mean(rounds), max(rounds) - min(rounds)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))
