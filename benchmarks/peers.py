"""Who is measured: this package and its peers, each as a call of the forward pass on the same memory.

That is (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) where the lengths differ. The result can be
differentiated where q, k and v require gradients. A peer that does not take a shape raises NotImplementedError.
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

#: This package's versions; they differ in the backward pass.
OURS, DETERMINISTIC = OWN = ("ours", "deterministic")


def _own(deterministic: bool) -> Builder:
    def build(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> Call:
        from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

        options = {"causal": shape.causal, "window_size": shape.window, "deterministic": deterministic}
        if shape.is_varlen:
            return functools.partial(flash_attn_varlen_func, q, k, v, **packed(shape, q.device), **options)
        return functools.partial(flash_attn_func, q, k, v, **options)

    return build


def packed(shape: AttentionShape, device: torch.device) -> dict[str, Any]:
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
    from torch._functorch import config as functorch_config
    from torch.nn.attention.flex_attention import flex_attention

    # Each shape gets its own code; without the larger limit, later shapes would run uncompiled.
    torch._dynamo.config.recompile_limit = 256
    # A backward pass that may overwrite what the forward pass saved refuses to run again on the same graph.
    functorch_config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> Call:
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {"causal": shape.causal}
    if shape.mask == "window":
        options["window_size"] = tuple(None if side == UNLIMITED else side for side in shape.window)
    function = flash_attn_func
    if shape.is_varlen:
        function, options = flash_attn_varlen_func, options | packed(shape, q.device)

    def call() -> torch.Tensor:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result  # some releases return the LSE, too

    return call


BUILDERS: dict[str, Builder] = {
    OURS: _own(deterministic=False),
    DETERMINISTIC: _own(deterministic=True),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flex": _flex,
    "fa4": _fa4,
}
LABELS = {
    OURS: "this package",
    DETERMINISTIC: "this package, deterministic",
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
        if name not in BUILDERS or name in OWN:
            allowed = ", ".join(peer for peer in BUILDERS if peer not in OWN)
            raise ValueError(f"--peers: got {name!r}; it must be among {allowed}")
    return names
