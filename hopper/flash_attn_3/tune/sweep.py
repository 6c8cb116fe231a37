"""The sweep over one key of the table: for each class of lengths heats, each around the winner of the last one, a final
with the L2 budgets, a decision.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ..cache import CompiledKernel
from ..config import ForwardConfig, Mask
from ..heuristics import plan_choice
from ..problem import HOPPER_SMS
from ..tile_table import ForwardTile, TileChoice, TileKey, TileTable
from .build import Built
from .choice import Decision, ShapeTimes, decide, ranking, without_class
from .job import Audit, Job, Variant
from .process import Measured
from .shapes import LengthClass, TuneShape
from .suspects import LEFT_OUT, Suspects


class Measurer(Protocol):
    """What measures jobs and audits: a `Worker`, or a stand-in for one."""

    def measure(self, job: Job | Audit, suspects: Suspects) -> Measured: ...


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        lengths: sequence lengths of the shapes.
        classes: which of them share a choice.
        steps: heats at most after the first, each with the neighbours of the fastest tile so far.
        finalists: tiles of a class that are measured again, with every budget.
        l2_budgets: bytes of keys and values, tried under a mask beside the present budget.
        warm_up: launches of each variant before it is timed.
        heat_turns: turns of each round of a heat.
        rounds, turns: rounds of a final, and turns in each.
        drop_behind: the share behind the fastest at which a variant is left out after the first round.
        deadline: no shape is begun after this value of `time.monotonic()`.
    """

    lengths: tuple[int, ...]
    classes: tuple[LengthClass, ...]
    steps: int
    finalists: int
    l2_budgets: tuple[int, ...]
    warm_up: int
    heat_turns: tuple[int, ...]
    rounds: int
    turns: int
    drop_behind: float
    deadline: float


@dataclasses.dataclass
class ShapeResult:
    """A shape of a heat or a final. Variants with the same launch were measured once and have the same times."""

    shape: TuneShape
    stage: str
    times: ShapeTimes
    errors: dict[TileChoice, float]
    failed: dict[TileChoice, str]
    abandoned: str | None


@dataclasses.dataclass
class KeyResult:
    """Everything about one key; of the tiles that would have changed the table, what makes them unfit, or None."""

    key: TileKey
    tiles: list[ForwardTile]
    built: Built
    shapes: list[ShapeResult] = dataclasses.field(default_factory=list)
    decisions: list[tuple[LengthClass, Decision]] = dataclasses.field(default_factory=list)
    audits: dict[ForwardTile, str | None] = dataclasses.field(default_factory=dict)


class KeySweep:
    """The sweep over one key.

    Args:
        table: the planner's present table.
        build: compiles kernels, or finds them.
        kernels: the folder that it compiles into; None: the user's cache.
        neighbours: what to try once a tile is the fastest; by default nothing but the tiles.
    """

    def __init__(
        self,
        key: TileKey,
        tiles: Sequence[ForwardTile],
        table: TileTable,
        build: Callable[[Sequence[ForwardConfig]], Built],
        measurer: Measurer,
        effort: Effort,
        kernels: Path | None,
        neighbours: Callable[[ForwardTile], Sequence[ForwardTile]] = lambda tile: (),
    ) -> None:
        self.result = KeyResult(key, [], Built())
        self._build = build
        self._first_tiles = list(tiles)
        self._neighbours = neighbours
        self._table = table
        self._measurer = measurer
        self._effort = effort
        self._suspects = Suspects()
        self._kernels = None if kernels is None else str(kernels.absolute())

    def run(self) -> KeyResult:
        """Measure and decide; a class whose shapes could not all be measured keeps its present choice."""
        finals: dict[LengthClass, list[ShapeResult] | None] = {}
        for lengths in self._effort.classes:
            shapes = [TuneShape.of(self.result.key, s) for s in self._effort.lengths if lengths.holds(s)]
            if shapes:
                finals[lengths] = self._heat_and_final(shapes)
        # Only now is it known which kernels failed on any length.
        self.result.decisions = [(lengths, self._decide(final)) for lengths, final in finals.items()]
        return self.result

    def _heat_and_final(self, shapes: Sequence[TuneShape]) -> list[ShapeResult] | None:
        ranked = self._heats(shapes)
        return None if ranked is None else self._measure("final", shapes, self._with_sound_siblings(ranked))

    def _heats(self, shapes: Sequence[TuneShape]) -> list[ForwardTile] | None:
        """The tiles of the last heat, the fastest first. From heat to heat the leaders stay."""
        ranked: list[ForwardTile] = []
        fresh, tried = self._first_tiles, set()
        for step in range(1 + self._effort.steps):
            tried |= set(fresh)
            tiles = self._usable(fresh)
            if step > 0 and not tiles:
                break
            heats = self._measure("heat", shapes, ranked[: self._effort.finalists] + tiles)
            if heats is None:
                return None
            ranked = ranking([heat.times for heat in heats])
            fresh = [tile for best in ranked[:1] for tile in self._neighbours(best) if tile not in tried]
        return ranked

    def _usable(self, tiles: Sequence[ForwardTile]) -> list[ForwardTile]:
        """Those whose kernels can be launched and do not spill; what no class has tried before is compiled."""
        key, result = self.result.key, self.result
        new = [tile for tile in tiles if tile not in result.tiles]
        result.tiles += new
        if new:
            result.built.add(self._build([key.config(tile) for tile in new]))
        configs = {tile: key.config(tile) for tile in tiles}
        return [tile for tile, c in configs.items() if c in result.built.kernels and c not in result.built.dropped]

    def _with_sound_siblings(self, ranked: Sequence[ForwardTile]) -> list[ForwardTile]:
        """The finalists: the first tiles whose kernels of the other dtypes and layouts are not dropped either.

        Where nothing can be compiled, a kernel that is missing counts as sound.
        """
        key, left, sound = self.result.key, list(ranked), []
        while left and len(sound) < self._effort.finalists:
            room = self._effort.finalists - len(sound)
            batch, left = left[:room], left[room:]
            built = self._build(
                [config for tile in batch for config in key.configs(tile) if config != key.config(tile)]
            )
            faults = {ForwardTile.of(c): (c, why) for c, why in built.dropped.items() if c not in built.missing}
            sound += [tile for tile in batch if tile not in faults]
            for tile, (config, why) in faults.items():
                self.result.built.dropped.setdefault(key.config(tile), f"{why}, as {config.name}")
        return sound

    def _decide(self, finals: Sequence[ShapeResult] | None) -> Decision:
        if finals is None:
            return _undecided("not all shapes of the class were measured")
        if any(self.result.key.config(final.times.present.tile) in self.result.built.missing for final in finals):
            return _undecided("the kernel of the present choice is missing, so there is nothing to compare with")
        while True:
            wrong = self._failed_tiles()
            decision = decide([final.times.without(wrong) for final in finals])
            if decision.choice is None or self._is_fit(decision.choice):
                return decision

    def _is_fit(self, choice: TileChoice) -> bool:
        """Whether what would serve the key with this choice computes attention on other calls than the timed ones."""
        if choice.tile not in self.result.audits:
            fault = self.result.audits[choice.tile] = self._audit(choice)
            if fault is not None:
                self.result.built.dropped.setdefault(self.result.key.config(choice.tile), f"unfit: {fault}")
        return self.result.audits[choice.tile] is None

    def _audit(self, choice: TileChoice) -> str | None:
        """What is wrong with the kernels of all dtypes and layouts, and with those that serve launches of few tiles."""
        key, variants = self.result.key, {}
        for tile in dict.fromkeys([choice.tile, choice.tile.of_one_warpgroup()]):
            built = self._build(key.configs(tile))
            for config, why in built.dropped.items():
                if config not in built.missing:
                    return f"{why}, as {config.name}"
            served = dataclasses.replace(choice, tile=tile)
            found = {config: built.kernels[config] for config in key.configs(tile) if config in built.kernels}
            variants |= {_variant(served, kernel, config): config for config, kernel in found.items()}
        measured = self._measurer.measure(Audit(key, tuple(variants), self._kernels), self._suspects)
        if measured.abandoned:
            return measured.abandoned
        return next((f"{reason}, as {variants[v].name}" for v, reason in measured.failed.items()), None)

    def _failed_tiles(self) -> set[ForwardTile]:
        """Tiles that were wrong, hung or crashed so far, on a shape or in an audit."""
        unfit = {tile for tile, fault in self.result.audits.items() if fault is not None}
        return unfit | {choice.tile for shape in self.result.shapes for choice in shape.failed}

    def _measure(
        self, stage: str, shapes: Sequence[TuneShape], tiles: Sequence[ForwardTile]
    ) -> list[ShapeResult] | None:
        """The shapes' results, or None when one was given up or the time is over."""
        results = []
        for shape in shapes:
            if time.monotonic() > self._effort.deadline:
                return None
            present = without_class(self._table.choice(self.result.key, shape.seqlen))
            wrong = self._failed_tiles()
            sound = [tile for tile in tiles if tile not in wrong]
            choices = [TileChoice(None, tile, budget) for tile in sound for budget in self._budgets(stage, present)]
            results.append(self._measure_shape(stage, shape, present, list(dict.fromkeys([present, *choices]))))
            self.result.shapes.append(results[-1])
            print(_progress(results[-1]), file=sys.stderr, flush=True)
            if results[-1].abandoned:
                return None
        return results

    def _budgets(self, stage: str, present: TileChoice) -> tuple[int, ...]:
        is_swept = stage == "final" and self.result.key.mask is not Mask.FULL
        return tuple(dict.fromkeys([present.l2_kv_bytes, *(self._effort.l2_budgets if is_swept else ())]))

    def _measure_shape(
        self, stage: str, shape: TuneShape, present: TileChoice, choices: Sequence[TileChoice]
    ) -> ShapeResult:
        launches = self._launches(shape, present, choices)
        final = stage == "final"
        measured = self._measurer.measure(
            Job(
                shape=shape,
                variants=tuple(launches),
                kernels=self._kernels,
                warm_up=self._effort.warm_up,
                turns=(self._effort.turns,) * self._effort.rounds if final else self._effort.heat_turns,
                drop_behind=self._effort.drop_behind,
            ),
            self._suspects,
        )
        times = {c: measured.rounds_ms[v] for v, same in launches.items() if v in measured.rounds_ms for c in same}
        return ShapeResult(
            shape,
            stage,
            ShapeTimes(present, {choice: times[choice] for choice in choices if choice in times}),
            {choice: measured.errors[v] for v, same in launches.items() if v in measured.errors for choice in same},
            {choice: measured.failed[v] for v, same in launches.items() if v in measured.failed for choice in same},
            measured.abandoned,
        )

    def _launches(
        self, shape: TuneShape, present: TileChoice, choices: Sequence[TileChoice]
    ) -> dict[Variant, list[TileChoice]]:
        """Launches that differ -> the choices that lead to them: budgets often allow the same number of heads."""
        problem = shape.problem(num_sms=HOPPER_SMS)
        groups: dict[tuple[ForwardConfig, int], list[TileChoice]] = {}
        for choice in choices:
            plan = plan_choice(problem, choice)
            if plan.config in self.result.built.kernels:
                groups.setdefault((plan.config, plan.heads_per_section), []).append(choice)
        return {
            _variant(same[0], self.result.built.kernels[config], config, present in same): same
            for (config, _), same in groups.items()
        }


def _variant(choice: TileChoice, kernel: CompiledKernel, config: ForwardConfig, is_present: bool = False) -> Variant:
    keys = kernel.meta["source_key"], kernel.meta["build_key"]
    return Variant(choice, *keys, is_present, config.dtype, config.seq_layout)


def _undecided(reason: str) -> Decision:
    return Decision(None, None, math.nan, math.nan, reason)


def _progress(result: ShapeResult) -> str:
    if result.abandoned:
        return f"{result.stage} {result.shape}: given up: {result.abandoned}"
    times = {choice: rounds[-1] for choice, rounds in result.times.rounds_ms.items() if rounds}
    best = f"{min(times.values()):.3f} ms" if times else "nothing"
    present = times.get(result.times.present)
    shown = "no result" if present is None else f"{present:.3f} ms"
    left_out = sum(reason.startswith(LEFT_OUT) for reason in result.failed.values())
    counts = f"{len(times)} choices, {len(result.failed) - left_out} failed, {left_out} left out"
    return f"{result.stage} {result.shape}: {counts}, best {best}, present {shown}"
