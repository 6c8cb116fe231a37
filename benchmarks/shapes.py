"""The shapes that are measured, and how a command line chooses among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

#: Tokens of a batch in the usual sets: short sequences come in larger batches.
TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class ForwardShape:
    """q is (batch, seqlen, heads_q, head_dim); k and v have heads_kv heads."""

    head_dim: int
    causal: bool
    batch: int
    seqlen: int
    heads_q: int
    heads_kv: int

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def flops(self) -> float:
        """Floating-point operations of both matrix products; half of them under a causal mask."""
        products = 4.0 * self.batch * self.heads_q * self.seqlen**2 * self.head_dim
        return products / 2 if self.causal else products

    @property
    def name(self) -> str:
        return f"d{self.head_dim} {self.mask} {self.batch}x{self.seqlen} {self.heads_q}/{self.heads_kv}"


def _square_shapes(seqlens: Iterable[int]) -> list[ForwardShape]:
    """16k tokens with 2048 features: 32, 16 and 8 heads of 64, 128 and 256."""
    return [
        ForwardShape(head_dim, causal, TOKENS // seqlen, seqlen, 2048 // head_dim, 2048 // head_dim)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in seqlens
    ]


def _grouped_shapes() -> list[ForwardShape]:
    return [
        ForwardShape(128, True, 4, 4096, 64, 8),
        ForwardShape(128, True, 2, 8192, 32, 8),
        ForwardShape(128, True, 1, 32768, 32, 8),
    ]


SETS: dict[str, list[ForwardShape]] = {
    "peers": _square_shapes((512, 1024, 2048, 4096, 8192, 16384)) + _grouped_shapes(),
    "bars": _square_shapes((8192,)),
    "quick": [shape for shape in _square_shapes((1024, 8192)) if shape.head_dim == 128],
}

#: head_dim -> least speed on the shapes of the set "bars", in units of cuDNN's.
LEAST_CUDNN_RATIO = {64: 0.95, 128: 1.02, 256: 0.95}


def select(words: str) -> list[ForwardShape]:
    """Shapes by a comma-separated list: a set's name, then filters such as d128, causal, s8192.

    Filters of one kind widen the choice (d64,d128: either), of different kinds narrow it (d64,causal: both).

    Raises:
        ValueError: an unknown word, or no shape left.
    """
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    names = [word for word in chosen if word in SETS]
    shapes = list(dict.fromkeys(shape for name in names or ["peers"] for shape in SETS[name]))
    head_dims, seqlens, masks = set(), set(), set()
    for word in chosen:
        match = re.fullmatch(r"([ds])(\d+)", word)
        if match:
            (head_dims if match[1] == "d" else seqlens).add(int(match[2]))
        elif word in ("full", "causal"):
            masks.add(word)
        elif word not in SETS:
            raise ValueError(
                f"--shapes: got {word!r}; it must be one of {', '.join(SETS)}, full, causal, or like d128 or s8192"
            )
    shapes = [
        shape
        for shape in shapes
        if (not head_dims or shape.head_dim in head_dims)
        and (not seqlens or shape.seqlen in seqlens)
        and (not masks or shape.mask in masks)
    ]
    if not shapes:
        raise ValueError(f"--shapes: {words!r} leaves no shape")
    return shapes
