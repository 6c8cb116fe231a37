"""What a measuring process is told, one JSON line a shape, and what it answers, one JSON line an event.

Events, in order: `ready` with the machine; then for each job `launching` before each launch of a variant, so that the
one that hangs or crashes is known; `failed` or `checked` for each variant, `round` after each round, and `done`. An
error that ends the process is `crashed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..plain_data import from_plain, to_plain
from ..tile_table import ForwardTile, TileChoice, TileKey
from .shapes import TuneShape


@dataclasses.dataclass(frozen=True)
class Variant:
    """One launch to measure: a kernel, and how many heads are worked on together.

    Attributes:
        choice: what the table would hold; its class of lengths does not matter here.
        source_key, build_key: the kernel's entry in the store.
        is_present: the table's present choice, measured in every round whatever its speed.
    """

    choice: TileChoice
    source_key: str
    build_key: str
    is_present: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """One shape and the variants to compare on it.

    Attributes:
        kernels: the folder of the compiled kernels; None: the user's cache.
        warm_up: launches of each variant before the first round.
        turns: for each round, how many turns each variant has.
        drop_behind: after the first round, variants slower than the fastest by more than this share are left out.
    """

    shape: TuneShape
    variants: tuple[Variant, ...]
    kernels: str | None
    warm_up: int
    turns: tuple[int, ...]
    drop_behind: float


def job_to_plain(job: Job) -> dict[str, Any]:
    shape = {**to_plain(job.shape), "key": to_plain(job.shape.key)}
    variants = [{**to_plain(variant), "choice": _plain_choice(variant.choice)} for variant in job.variants]
    return {**to_plain(job), "shape": shape, "variants": variants}


def job_from_plain(values: Mapping[str, Any]) -> Job:
    shape = TuneShape(**{**values["shape"], "key": from_plain(TileKey, values["shape"]["key"])})
    variants = tuple(Variant(**{**variant, "choice": _choice(variant["choice"])}) for variant in values["variants"])
    return Job(**{**values, "shape": shape, "variants": variants, "turns": tuple(values["turns"])})


def _plain_choice(choice: TileChoice) -> dict[str, Any]:
    return {**to_plain(choice), "tile": to_plain(choice.tile)}


def _choice(values: Mapping[str, Any]) -> TileChoice:
    return TileChoice(**{**values, "tile": from_plain(ForwardTile, values["tile"])})
