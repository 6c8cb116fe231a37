"""The shapes that are measured, and how a command line chooses among them."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable

#: Tokens of a batch in the usual sets: short sequences come in larger batches.
TOKENS = 16384
#: Operations of the backward pass in units of the forward pass's, as everybody counts them: five products for two.
BACKWARD_FLOPS = 2.5
#: A window side that does not limit anything.
UNLIMITED = -1


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """q is (batch, seqlen, heads_q, head_dim); k and v have heads_kv heads.

    Attributes:
        window: keys to the left and to the right of the diagonal that a query sees.
        lengths: the sequences' lengths where they differ; q is then (sum of them, heads_q, head_dim), batch their
            number and seqlen the longest.
        head_dim_v: of v and the output, where it is not head_dim.
    """

    head_dim: int
    causal: bool
    batch: int
    seqlen: int
    heads_q: int
    heads_kv: int
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    lengths: tuple[int, ...] = ()
    head_dim_v: int | None = None

    @property
    def mask(self) -> str:
        if self.window != (UNLIMITED, UNLIMITED):
            return "window"
        return "causal" if self.causal else "full"

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of q and k, and of v and the output."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def is_varlen(self) -> bool:
        return bool(self.lengths)

    @property
    def is_plain(self) -> bool:
        """Whether every peer takes this shape: no window, equal lengths."""
        return self.mask != "window" and not self.is_varlen

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, in all sequences of one head."""
        left, right = self.window
        right = 0 if self.causal else right
        return sum(_visible_pairs(n, left, right) for n in self.lengths or (self.seqlen,) * self.batch)

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass; plain causal masks count half, as everywhere."""
        for_a_pair = 2.0 * self.heads_q * sum(self.head_dims)
        if self.is_plain:
            products = for_a_pair * self.batch * self.seqlen**2
            return products / 2 if self.causal else products
        return for_a_pair * self.visible_pairs

    @property
    def name(self) -> str:
        head_dim = f"d{self.head_dim}" + ("" if self.head_dim_v is None else f"/{self.head_dim_v}")
        heads = f"{self.heads_q}/{self.heads_kv}"
        if self.is_varlen:
            return f"{head_dim} {self.mask} {self.batch} of {min(self.lengths)} to {self.seqlen} {heads}"
        mask = f"window {self.window[0]},{self.window[1]}" if self.mask == "window" else self.mask
        return f"{head_dim} {mask} {self.batch}x{self.seqlen} {heads}"

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k and v."""
        rows = (sum(self.lengths),) if self.is_varlen else (self.batch, self.seqlen)
        head_dim, head_dim_v = self.head_dims
        return (*rows, self.heads_q, head_dim), (*rows, self.heads_kv, head_dim), (*rows, self.heads_kv, head_dim_v)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.input_shapes[0][:-1], self.head_dims[1]


def _visible_pairs(seqlen: int, left: int, right: int) -> int:
    """The diagonal, and the diagonals beside it; the one at distance d has seqlen - d pairs."""
    sides = (seqlen - 1 if side == UNLIMITED else min(side, seqlen - 1) for side in (left, right))
    return seqlen + sum(side * seqlen - side * (side + 1) // 2 for side in sides)


def _square_shapes(seqlens: Iterable[int]) -> list[AttentionShape]:
    """16k tokens with 2048 features: 32, 16 and 8 heads of 64, 128 and 256."""
    return [
        AttentionShape(head_dim, causal, TOKENS // seqlen, seqlen, 2048 // head_dim, 2048 // head_dim)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in seqlens
    ]


def _grouped_shapes() -> list[AttentionShape]:
    return [
        AttentionShape(128, True, 4, 4096, 64, 8),
        AttentionShape(128, True, 2, 8192, 32, 8),
        AttentionShape(128, True, 1, 32768, 32, 8),
    ]


# -- windows and batches of different lengths ------------------------------------------------------------

#: Batches that are drawn, sequences in each, their tokens, and how much longer the longest is than the shortest.
VARLEN_BATCHES, VARLEN_SEQUENCES, VARLEN_TOKENS, VARLEN_SPREAD = 8, 16, 32768, 16.0
SLIDING_WINDOW = (1024, 0)


def draw_lengths(draw: random.Random, sequences: int, tokens: int, spread: float) -> tuple[int, ...]:
    """Log-uniform lengths: the longest is `spread` times the shortest, and all together have `tokens` tokens."""
    exponents = [draw.random() for _ in range(sequences)]
    low, high = min(exponents), max(exponents)
    weights = [spread ** ((exponent - low) / (high - low)) for exponent in exponents]
    ends = [round(tokens * sum(weights[: i + 1]) / sum(weights)) for i in range(sequences)]
    return tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))


def _varlen_shapes() -> list[AttentionShape]:
    draw = random.Random(0)
    batches = [draw_lengths(draw, VARLEN_SEQUENCES, VARLEN_TOKENS, VARLEN_SPREAD) for _ in range(VARLEN_BATCHES)]
    return [
        AttentionShape(
            head_dim, causal, len(lengths), max(lengths), 2048 // head_dim, 2048 // head_dim, lengths=lengths
        )
        for head_dim in (64, 128)
        for causal in (False, True)
        for lengths in batches
    ]


def _window_shapes() -> list[AttentionShape]:
    return [
        AttentionShape(head_dim, False, 1, 16384, 2048 // head_dim, 2048 // head_dim, window=SLIDING_WINDOW)
        for head_dim in (64, 128)
    ]


def _wide_key_shapes() -> list[AttentionShape]:
    """Queries and keys of 192 columns, values of 128."""
    return [
        AttentionShape(192, causal, 2, seqlen, 128, 128, head_dim_v=128)
        for causal in (False, True)
        for seqlen in (4096, 8192)
    ]


#: One head group of 32/8, very long, and the length that its speed is compared with.
LONGEST = AttentionShape(128, True, 1, 131072, 4, 1)
_LONG = AttentionShape(128, True, 1, 32768, 4, 1)


def counterpart(shape: AttentionShape) -> AttentionShape | None:
    """The shape that this one is timed beside, since it should be as fast for each visible pair; None: no other.

    A window's is the causal mask of the same length; that of a batch of different lengths has as many sequences, all
    of the mean length; that of the longest shape is a quarter as long.
    """
    if shape == LONGEST:
        return _LONG
    if shape.is_varlen:
        return dataclasses.replace(shape, seqlen=sum(shape.lengths) // shape.batch, lengths=())
    if shape.mask == "window":
        return dataclasses.replace(shape, causal=True, window=(UNLIMITED, UNLIMITED))
    return None


SETS: dict[str, list[AttentionShape]] = {
    "peers": _square_shapes((512, 1024, 2048, 4096, 8192, 16384)) + _grouped_shapes(),
    "bars": _square_shapes((8192,)),
    "quick": [shape for shape in _square_shapes((1024, 8192)) if shape.head_dim == 128],
    "b4": _window_shapes() + _varlen_shapes(),
    "b7": [LONGEST],
    "c4": _wide_key_shapes(),
}


def select(words: str) -> list[AttentionShape]:
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
        elif word in ("full", "causal", "window"):
            masks.add(word)
        elif word not in SETS:
            raise ValueError(
                f"--shapes: got {word!r}; it must be one of {', '.join((*SETS, 'full', 'causal', 'window'))}, "
                "or like d128 or s8192"
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
