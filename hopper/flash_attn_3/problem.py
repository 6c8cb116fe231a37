"""What is asked of a kernel: shapes and options of one call, after normalisation, without tensors.

A `Problem` is hashable and small; the planner's answer to it is cached. It holds nothing that
changes between calls of the same shape (pointers, strides, scales, the lengths of a variable-length batch).
"""

from __future__ import annotations

import dataclasses
import enum
import math

from .config import Dtype, Mask, Score, SeqLayout

#: Head dims come in steps of this many elements (16 bytes, the granularity of TMA).
HEAD_DIM_STEP = 8
#: Widest value head dim beside a head dim of at most 64.
MAX_HEAD_DIM_V = 512
#: Multiprocessors of an H100 or H200 with an SXM socket.
HOPPER_SMS = 132
#: A window side that does not limit anything.
UNLIMITED = -1
#: Most rows of a sequence, and the widest chunk that still matters. The kernels add two lengths and a window side,
#: or a position and a chunk, in 32 bits.
MAX_SEQLEN = 2**29


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """A normalised mask. Row i sits at key position p = i + seqlen_k - seqlen_q (bottom-right alignment).

    It sees key j iff p - window_left <= j <= p + window_right (an `UNLIMITED` side does not limit) and, when
    attention_chunk > 0, j lies in the same chunk of that width as p.
    """

    mask: Mask
    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    attention_chunk: int = 0


def normalize_mask(
    causal: bool, window_size: tuple[int, int], attention_chunk: int, max_seqlen_q: int, max_seqlen_k: int
) -> MaskSpec:
    """Reduce the public options to the cheapest equivalent mask.

    ``causal`` sets right to 0. A side that reaches past every key limits nothing: left >= max_seqlen_k - 1,
    right >= max_seqlen_q - 1; so one query row per sequence needs no causal mask, since it is the last row.

    Args:
        causal: bottom-right aligned causal mask.
        window_size: (left, right) in keys; a negative side is unlimited.
        attention_chunk: chunk width in keys, 0 for none.
        max_seqlen_q, max_seqlen_k: longest sequence on each side.
    """
    left, right = window_size
    if causal:
        right = 0
    if left < 0 or left >= max_seqlen_k - 1:
        left = UNLIMITED
    if right < 0 or right >= max_seqlen_q - 1:
        right = UNLIMITED
    if left == UNLIMITED and attention_chunk == 0:
        if right == UNLIMITED:
            return MaskSpec(Mask.FULL)
        if right == 0:
            return MaskSpec(Mask.CAUSAL, UNLIMITED, 0)
    return MaskSpec(Mask.LOCAL, left, right, min(attention_chunk, MAX_SEQLEN))


class Packing(enum.Enum):
    """Whether query heads that share a key head may lie in one tile. AUTO: where that fills tiles better."""

    AUTO = enum.auto()
    ALWAYS = enum.auto()
    NEVER = enum.auto()


@dataclasses.dataclass(frozen=True)
class ForwardProblem:
    """One forward call, as far as the planner cares.

    Attributes:
        dtype: element type of q, k, v and out.
        batch: number of sequences.
        max_seqlen_q, max_seqlen_k: the (longest) lengths in rows.
        heads_q, heads_kv: head counts; heads_q is a multiple of heads_kv.
        head_dim, head_dim_v: the caller's head dims, not padded.
        mask: the normalised mask.
        score: whether a softcap is applied.
        seq_layout: VARLEN as soon as any of cu_seqlens_* or seqused_* is given.
        num_sms: multiprocessors the kernel may use (device count minus sm_margin).
        packing: of query heads in tiles.
    """

    dtype: Dtype
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    mask: MaskSpec
    score: Score
    seq_layout: SeqLayout
    num_sms: int
    packing: Packing = Packing.AUTO


@dataclasses.dataclass(frozen=True)
class ScoreScales:
    """The two factors that a kernel is launched with. The softmax is taken in base 2 over exp2_scale * score.

    Without a softcap the score is q.k itself and score_scale is 1; with one it is tanh(score_scale * q.k).
    """

    score_scale: float
    exp2_scale: float

    @classmethod
    def of(cls, softmax_scale: float, softcap: float) -> ScoreScales:
        """Of softcap * tanh(softmax_scale * q.k / softcap), or of softmax_scale * q.k where softcap is 0."""
        if softcap > 0.0:
            return cls(softmax_scale / softcap, softcap * math.log2(math.e))
        return cls(1.0, softmax_scale * math.log2(math.e))
