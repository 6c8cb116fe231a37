"""Who is measured: this package and its peers, each as a call on the same memory.

That is (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) where the lengths differ. A peer that does not
take a shape raises NotImplementedError.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .shapes import UNLIMITED, AttentionShape

Call = Callable[[], torch.Tensor]
Builder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionShape], Call]

OURS = "ours"


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> Call:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    options = {"causal": shape.causal, "window_size": shape.window}
    if shape.is_varlen:
        return functools.partial(flash_attn_varlen_func, q, k, v, **_packed(shape, q.device), **options)
    return functools.partial(flash_attn_func, q, k, v, **options)


def _packed(shape: AttentionShape, device: torch.device) -> dict[str, Any]:
    """The arguments that say where the sequences of a batch begin."""
    offsets = torch.tensor([0, *itertools.accumulate(shape.lengths)], dtype=torch.int32, device=device)
    longest = max(shape.lengths)
    return {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _sdpa(backend: SDPBackend) -> Builder:
    def build(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> Call:
        if not shape.is_plain:
            raise NotImplementedError("SDPA has neither windows nor sequences of different lengths")
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        is_grouped = shape.heads_q != shape.heads_kv

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(
                    *heads_first, is_causal=shape.causal, enable_gqa=is_grouped
                )
            return out.transpose(1, 2)

        return call

    return build


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    if not shape.is_plain:
        raise NotImplementedError("measured here without windows, on sequences of equal length")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    block_mask = None
    if shape.causal:
        seqlen = shape.seqlen
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen, device=q.device)
    attention = _compiled_flex_attention()

    def call() -> torch.Tensor:
        out = attention(*heads_first, block_mask=block_mask, enable_gqa=shape.heads_q != shape.heads_kv)
        return out.transpose(1, 2)

    return call


@functools.cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Each shape gets its own code; without the larger limit, later shapes would run uncompiled.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> Call:
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {"causal": shape.causal}
    if shape.mask == "window":
        options["window_size"] = tuple(None if side == UNLIMITED else side for side in shape.window)
    function = flash_attn_func
    if shape.is_varlen:
        function, options = flash_attn_varlen_func, options | _packed(shape, q.device)

    def call() -> torch.Tensor:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result  # some releases return the LSE, too

    return call


BUILDERS: dict[str, Builder] = {
    OURS: _ours,
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flex": _flex,
    "fa4": _fa4,
}
LABELS = {
    OURS: "this package",
    "cudnn": "cuDNN (torch SDPA)",
    "flash": "flash (torch SDPA)",
    "flex": "flex_attention",
    "fa4": "FlashAttention-4",
    "fa3": "FlashAttention-3 equivalent",
}


def select(words: str) -> list[str]:
    """Peers by a comma-separated list of names; raises ValueError for an unknown one."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in BUILDERS or name == OURS:
            allowed = ", ".join(peer for peer in BUILDERS if peer != OURS)
            raise ValueError(f"--peers: got {name!r}; it must be among {allowed}")
    return names


#: TFLOP/s of FlashAttention-3 (main of August 2026, nvcc 13.0) and of cuDNN 9.19 in one run on an H200, 2026-11-21,
#: bf16, 16k tokens (the last row of head dim 128: 32k). FlashAttention-3 has no wheel that a benchmark could install;
#: what it would reach in another run is estimated as cuDNN in that run times this ratio.
_MEASURED: dict[tuple[int, str], dict[tuple[int, int, int], tuple[int, int]]] = {
    # (head dim, mask): {(seqlen, heads_q, heads_kv): (FlashAttention-3, cuDNN)}
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


def fa3_over_cudnn(shape: AttentionShape) -> float | None:
    """How much faster FlashAttention-3 was than cuDNN on this shape, or None where that was not measured."""
    if not shape.is_plain:
        return None
    row = _MEASURED.get((shape.head_dim, shape.mask), {}).get((shape.seqlen, shape.heads_q, shape.heads_kv))
    return row[0] / row[1] if row else None
