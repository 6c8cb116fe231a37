"""FlashAttention-3 beside cuDNN: what a benchmark estimates it by, since there is no wheel that it could install.

TFLOP/s of FlashAttention-3 (main of August 2026, nvcc 13.0) and of cuDNN 9.19 in one run on an H200, 2026-11-21, bf16,
16k tokens (sequences of 32768: 32k). In another run it is taken to reach cuDNN's speed there times their ratio here.
"""

from __future__ import annotations

from .shapes import BACKWARD_FLOPS, AttentionShape

#: (head dim, mask): {(seqlen, heads_q, heads_kv): (FlashAttention-3, cuDNN)}
_Measured = dict[tuple[int, str], dict[tuple[int, int, int], tuple[int, int]]]

_FORWARD: _Measured = {
    (64, "full"): {
        (512, 32, 32): (327, 382),
        (1024, 32, 32): (369, 422),
        (2048, 32, 32): (462, 448),
        (4096, 32, 32): (471, 455),
        (8192, 32, 32): (513, 448),
        (16384, 32, 32): (520, 456),
    },
    (64, "causal"): {
        (512, 32, 32): (221, 258),
        (1024, 32, 32): (292, 334),
        (2048, 32, 32): (392, 386),
        (4096, 32, 32): (432, 420),
        (8192, 32, 32): (487, 433),
        (16384, 32, 32): (504, 436),
    },
    (128, "full"): {
        (512, 16, 16): (494, 505),
        (1024, 16, 16): (593, 570),
        (2048, 16, 16): (631, 618),
        (4096, 16, 16): (640, 603),
        (8192, 16, 16): (658, 642),
        (16384, 16, 16): (669, 590),
    },
    (128, "causal"): {
        (512, 16, 16): (278, 331),
        (1024, 16, 16): (445, 424),
        (2048, 16, 16): (545, 470),
        (4096, 16, 16): (582, 507),
        (8192, 16, 16): (625, 543),
        (16384, 16, 16): (648, 544),
        (4096, 64, 8): (605, 520),
        (8192, 32, 8): (631, 546),
        (32768, 32, 8): (667, 578),
    },
    (256, "full"): {
        (512, 8, 8): (489, 512),
        (1024, 8, 8): (610, 590),
        (2048, 8, 8): (663, 629),
        (4096, 8, 8): (694, 671),
        (8192, 8, 8): (708, 650),
        (16384, 8, 8): (723, 680),
    },
    (256, "causal"): {
        (512, 8, 8): (246, 337),
        (1024, 8, 8): (455, 441),
        (2048, 8, 8): (556, 512),
        (4096, 8, 8): (595, 565),
        (8192, 8, 8): (673, 584),
        (16384, 8, 8): (694, 599),
    },
}
_BACKWARD: _Measured = {
    (64, "full"): {
        (512, 32, 32): (320, 279),
        (1024, 32, 32): (411, 360),
        (2048, 32, 32): (463, 394),
        (4096, 32, 32): (468, 440),
        (8192, 32, 32): (510, 442),
        (16384, 32, 32): (527, 437),
    },
    (64, "causal"): {
        (512, 32, 32): (194, 167),
        (1024, 32, 32): (297, 247),
        (2048, 32, 32): (394, 325),
        (4096, 32, 32): (461, 383),
        (8192, 32, 32): (506, 397),
        (16384, 32, 32): (516, 424),
    },
    (128, "full"): {
        (512, 16, 16): (347, 339),
        (1024, 16, 16): (449, 441),
        (2048, 16, 16): (526, 499),
        (4096, 16, 16): (548, 509),
        (8192, 16, 16): (580, 527),
        (16384, 16, 16): (590, 529),
    },
    (128, "causal"): {
        (512, 16, 16): (224, 211),
        (1024, 16, 16): (349, 316),
        (2048, 16, 16): (451, 401),
        (4096, 16, 16): (516, 448),
        (8192, 16, 16): (556, 507),
        (16384, 16, 16): (579, 527),
        (4096, 64, 8): (505, 452),
        (8192, 32, 8): (552, 485),
        (32768, 32, 8): (591, 531),
    },
    (256, "full"): {
        (512, 8, 8): (284, 237),
        (1024, 8, 8): (373, 297),
        (2048, 8, 8): (414, 354),
        (4096, 8, 8): (420, 370),
        (8192, 8, 8): (446, 356),
        (16384, 8, 8): (441, 354),
    },
    (256, "causal"): {
        (512, 8, 8): (197, 178),
        (1024, 8, 8): (293, 252),
        (2048, 8, 8): (363, 305),
        (4096, 8, 8): (409, 342),
        (8192, 8, 8): (438, 369),
        (16384, 8, 8): (448, 374),
    },
}


def forward_ratio(shape: AttentionShape) -> float | None:
    """How much faster FlashAttention-3's forward pass was than cuDNN's, or None where that was not measured."""
    return _ratio(_FORWARD, shape)


def backward_ratio(shape: AttentionShape) -> float | None:
    """The same of the backward pass."""
    return _ratio(_BACKWARD, shape)


def both_ratio(shape: AttentionShape) -> float | None:
    """The same of both passes together, from their times one by one."""
    forward, backward = _find(_FORWARD, shape), _find(_BACKWARD, shape)
    if forward is None or backward is None:
        return None
    fa3, cudnn = (1 / one + BACKWARD_FLOPS / other for one, other in zip(forward, backward, strict=True))
    return cudnn / fa3


def _ratio(measured: _Measured, shape: AttentionShape) -> float | None:
    row = _find(measured, shape)
    return row[0] / row[1] if row else None


def _find(measured: _Measured, shape: AttentionShape) -> tuple[int, int] | None:
    if not shape.is_plain or shape.head_dim_v is not None:
        return None
    return measured.get((shape.head_dim, shape.mask), {}).get((shape.seqlen, shape.heads_q, shape.heads_kv))
