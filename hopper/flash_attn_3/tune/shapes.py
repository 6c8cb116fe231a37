"""What the tuner measures, and which lengths share one entry of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..config import Dtype, Mask, Score, SeqLayout
from ..problem import UNLIMITED, ForwardProblem, MaskSpec
from ..tile_table import TileKey

#: Tokens of a batch, and the width of all its heads: 32, 16 and 8 heads of 64, 128 and 256.
TOKENS = 16384
FEATURES = 2048
#: Keys to the left of the diagonal under a local mask; at most half of the sequence, so that it hides something.
WINDOW_LEFT = 1024
#: The cap where scores are capped.
SOFTCAP = 30.0


def whole_mask(mask: Mask) -> MaskSpec:
    """The mask of a key that has no window."""
    return MaskSpec(mask, UNLIMITED, 0 if mask is Mask.CAUSAL else UNLIMITED)


def softcap_of(score: Score) -> float:
    return SOFTCAP if score is Score.SOFTCAP else 0.0


@dataclasses.dataclass(frozen=True)
class TuneShape:
    """`batch` sequences of `seqlen` queries and keys with `heads` heads, bfloat16."""

    key: TileKey
    batch: int
    seqlen: int
    heads: int

    @classmethod
    def of(cls, key: TileKey, seqlen: int) -> TuneShape:
        return cls(key, max(1, TOKENS // seqlen), seqlen, max(1, FEATURES // key.head_dim))

    @property
    def mask(self) -> MaskSpec:
        if self.key.mask is Mask.LOCAL:
            return MaskSpec(Mask.LOCAL, min(WINDOW_LEFT, self.seqlen // 2), 0)
        return whole_mask(self.key.mask)

    @property
    def softcap(self) -> float:
        return softcap_of(self.key.score)

    def problem(self, num_sms: int) -> ForwardProblem:
        return ForwardProblem(
            dtype=Dtype.BF16,
            batch=self.batch,
            max_seqlen_q=self.seqlen,
            max_seqlen_k=self.seqlen,
            heads_q=self.heads,
            heads_kv=self.heads,
            head_dim=self.key.head_dim,
            head_dim_v=self.key.head_dim_v,
            mask=self.mask,
            score=self.key.score,
            seq_layout=SeqLayout.DENSE,
            num_sms=num_sms,
        )

    def __str__(self) -> str:
        return f"{self.key} {self.batch}x{self.seqlen} {self.heads} heads"


@dataclasses.dataclass(frozen=True)
class LengthClass:
    """The lengths above `above`, up to `bound` (None: all of them)."""

    above: int
    bound: int | None

    def holds(self, seqlen: int) -> bool:
        return self.above < seqlen and (self.bound is None or seqlen <= self.bound)

    def __str__(self) -> str:
        return f"S > {self.above}" if self.bound is None else f"{self.above} < S <= {self.bound}"


def length_classes(bounds: Sequence[int]) -> list[LengthClass]:
    """The classes between these bounds, the shortest first; the last one is unbounded."""
    edges = sorted(set(bounds))
    return [LengthClass(above, bound) for above, bound in zip([0, *edges], [*edges, None], strict=True)]
