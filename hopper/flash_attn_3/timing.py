"""Timing on a GPU: medians from a cold L2 cache, versions taking turns. Used by the tuner and by the benchmarks."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch

#: Turns that each version has in a round, and launches in a turn. A turn takes a few milliseconds, so that all versions
#: meet the same clocks: the card lowers them within tenths of a second when it reaches its power limit.
TURNS = 12
LAUNCHES = 5
#: Overwritten before each launch, so that none finds its operands in the 50 MB L2 cache.
FLUSH_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of the rounds' launches, in milliseconds."""

    rounds_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.mean(self.rounds_ms)

    @property
    def spread(self) -> float:
        """Distance between the slowest and the fastest round, relative to their mean."""
        return (max(self.rounds_ms) - min(self.rounds_ms)) / self.ms


class TurnTimer:
    """Measures versions side by side in rounds of short turns, in an order drawn anew for each turn.

    Args:
        calls: what to measure, by name; a call enqueues work on the current stream.
        announce: told the name before each turn.
    """

    def __init__(self, calls: Mapping[str, Callable[[], object]], announce: Callable[[str], None] = lambda name: None):
        self._calls = calls
        self._announce = announce
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._draw = random.Random(0)

    def warm_up(self, launches: int = LAUNCHES) -> None:
        """Launch each version a few times, unmeasured."""
        for name in self._calls:
            self._turn(name, launches)

    def round(self, names: Iterable[str], turns: int = TURNS) -> dict[str, float]:
        """Milliseconds of a launch: for each version the median over its turns."""
        launches: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(turns):
            for name in self._draw.sample(list(launches), len(launches)):
                launches[name] += self._turn(name, LAUNCHES)
        return {name: statistics.median(times) for name, times in launches.items()}

    def _turn(self, name: str, launches: int) -> list[float]:
        """Milliseconds of each launch of one turn. They are queued together, so that the device waits for no host."""
        self._announce(name)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(launches)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            self._calls[name]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def time_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int = 2) -> dict[str, Timing]:
    """Measure each call in `rounds` rounds of many short turns."""
    timer = TurnTimer(calls)
    timer.warm_up()
    measured = [timer.round(calls) for _ in range(rounds)]
    return {name: Timing(tuple(medians[name] for medians in measured)) for name in calls}
