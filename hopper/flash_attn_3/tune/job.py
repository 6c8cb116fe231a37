"""What a measuring process is told, one JSON line a job, and what it answers, one JSON line an event.

A `Job` is a shape to measure; an `Audit` are kernels to check on the other calls that they would serve, untimed.

Events, in order: `ready` with the machine; then for each job `launching` before each launch of a variant, so that the
one that hangs or crashes is known; `failed` or `checked` (of an audit `audited`) for each variant, `round` after each
round, and `done`. An error that ends the process is `crashed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import Dtype, ForwardConfig, SeqLayout
from ..plain_data import from_plain, parse, to_plain
from ..tile_table import ForwardTile, TileChoice, TileKey
from .shapes import TuneShape


@dataclasses.dataclass(frozen=True)
class Variant:
    """One launch to measure: a kernel, and how many heads are worked on together.

    Attributes:
        choice: what the table would hold; its class of lengths does not matter here.
        source_key, build_key: the kernel's entry in the store.
        is_present: the table's present choice, measured in every round whatever its speed.
        dtype, seq_layout: of the kernel.
    """

    choice: TileChoice
    source_key: str
    build_key: str
    is_present: bool = False
    dtype: Dtype = Dtype.BF16
    seq_layout: SeqLayout = SeqLayout.DENSE

    def config(self, key: TileKey) -> ForwardConfig:
        """The kernel, as one of a key."""
        return key.config(self.choice.tile, self.dtype, self.seq_layout)


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


@dataclasses.dataclass(frozen=True)
class Audit:
    """Kernels of one key that are held against ragged calls (`serving`).

    Attributes:
        kernels: the folder of the compiled kernels; None: the user's cache.
    """

    key: TileKey
    variants: tuple[Variant, ...]
    kernels: str | None


def job_to_plain(job: Job | Audit) -> dict[str, Any]:
    variants = [{**to_plain(variant), "choice": _plain_choice(variant.choice)} for variant in job.variants]
    if isinstance(job, Audit):
        return {"key": to_plain(job.key), "variants": variants, "kernels": job.kernels}
    shape = {**to_plain(job.shape), "key": to_plain(job.shape.key)}
    return {**to_plain(job), "shape": shape, "variants": variants}


def job_from_plain(values: Mapping[str, Any]) -> Job | Audit:
    variants = tuple(_variant(variant) for variant in values["variants"])
    if "key" in values:
        return Audit(from_plain(TileKey, values["key"]), variants, values["kernels"])
    shape = TuneShape(**{**values["shape"], "key": from_plain(TileKey, values["shape"]["key"])})
    return Job(**{**values, "shape": shape, "variants": variants, "turns": tuple(values["turns"])})


def _variant(values: Mapping[str, Any]) -> Variant:
    enums = {name: parse(name, values[name], cls) for name, cls in (("dtype", Dtype), ("seq_layout", SeqLayout))}
    return Variant(**{**values, **enums, "choice": _choice(values["choice"])})


def _plain_choice(choice: TileChoice) -> dict[str, Any]:
    return {**to_plain(choice), "tile": to_plain(choice.tile)}


def _choice(values: Mapping[str, Any]) -> TileChoice:
    return TileChoice(**{**values, "tile": from_plain(ForwardTile, values["tile"])})
