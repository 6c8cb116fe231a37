"""The public functions, with FlashAttention-3's signatures.

Shapes in all of them: b sequences, sq and sk rows of queries and keys, h query heads, hk key/value heads (h is a
multiple of hk; query head i reads key/value head i // (h / hk)), head dims d and dv.
"""

from __future__ import annotations

import torch

from .arguments import plain_bool, reject_unavailable
from .autograd import attend, attend_packed
from .config import HEAD_DIM_TILES
from .flash_attn_config import CONFIG
from .unavailable_ops import raise_unavailable

#: There is no AMD back end; the name is read by programs that ask which one is in use.
USE_TRITON_ROCM = False
flash_attn_3_gpu = torch.ops.flash_attn_3


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
):
    """softmax(softmax_scale * q @ k^T) @ v, exactly, for sequences of equal length.

    Query row i stands at key position i + sk - sq (bottom-right alignment). A row that sees no key gives out 0 and
    a log-sum-exp of -inf. CPU tensors run a slow model of the kernel; CUDA tensors need a Hopper GPU.

    Gradients flow to q, k and v, from out and from lse, so results over disjoint keys may be merged by their
    log-sum-exps and trained through; they cannot be differentiated again. A row or key that sees nothing has gradient
    0; the gradient of such a row's lse may be anything, NaN too, but that of its out must be finite.
    Forward-mode derivatives and the transforms of torch.func do not exist, and raise NotImplementedError on CUDA
    devices and the CPU alike.

    Args:
        q: (b, sq, h, d), float16 or bfloat16. d is a multiple of 8, at most 256.
        k: (b, sk, hk, d), dtype of q.
        v: (b, sk, hk, dv), dtype of q. dv = d; or dv <= 512 where d <= 64; or 96 < dv <= 128 < d <= 192. Wider than
            256, it cannot be differentiated.
        softmax_scale: finite and > 0; d ** -0.5 by default. It and softcap may be any real number, numpy's too, or a
            tensor of one element, which is read at once and gets no gradient; in a full graph of torch.compile they,
            and all other options, must be Python's own numbers.
        causal: a row sees the keys up to its own position; the same as window_size=(left, 0).
        qv: not available yet.
        q_descale, k_descale, v_descale: float32 (b, hk); only FP8 inputs, which are not available yet, read them.
        window_size: (left, right): a row at position p sees keys p - left to p + right. -1 or None: unlimited.
        attention_chunk: if > 0, a row sees only keys of its own chunk of that many positions.
        softcap: if > 0, a score becomes softcap * tanh(score / softcap).
        num_splits: 1, or <= 0 to leave the number to the planner. More is not available yet.
        pack_gqa: a hint: whether query heads that share a key head are worked on together, which fills the tiles of
            short sequences; None: where that pays, and always with variable lengths. As many together as divide h / hk,
            at most 64; so True changes nothing where h / hk is a larger prime.
        deterministic: gradients of equal calls are bitwise equal, compiled or not; for that, parts of dq are added in a
            fixed order, which takes time. out and lse always are.
        sm_margin: multiprocessors that are left to others; not by the short kernels before and after the main one of
            the backward pass.
        return_attn_probs: return the log-sum-exp too.

    Returns:
        out (b, sq, h, dv), dtype of q; with return_attn_probs the pair (out, lse), lse float32 (b, h, sq): the
        natural logarithm of the softmax's denominator.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the text names it. Bools may be 0, 1 or numpy's, too, but
            nothing else that merely counts as true or false.
        NotImplementedError: a feature is not available yet, or a derivative does not exist.
        UnsupportedDeviceError: the GPU is not a Hopper.
    """
    if return_attn_probs is not True and return_attn_probs is not False:
        return_attn_probs = plain_bool("return_attn_probs", return_attn_probs)
    if qv is not None:
        reject_unavailable(qv=qv)
    extras = (None, None, None, None, q_descale, k_descale, v_descale)
    options = (
        None,
        None,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        sm_margin,
    )
    out, lse = attend(q, k, v, extras, options, deterministic)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
):
    """`flash_attn_func` on queries, keys and values in one tensor, without copying them.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, h + 2 * hk, d) with num_heads_q.
        num_heads_q: h of a 4-dimensional qkv; what it leaves are hk key heads and hk value heads. With 5 dimensions
            it is not needed, and any number but h is an error.

    The other arguments, the returns and the errors are those of `flash_attn_func`. The gradient is one tensor, too;
    in eager mode its parts are written in place.
    """
    if return_attn_probs is not True and return_attn_probs is not False:
        return_attn_probs = plain_bool("return_attn_probs", return_attn_probs)
    extras = (None, None, None, None, q_descale, k_descale, v_descale)
    options = (None, None, softmax_scale, causal, window_size, attention_chunk, softcap, 1, None, sm_margin)
    out, lse = attend_packed(qkv, num_heads_q, extras, options, deterministic)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
):
    """`flash_attn_func` on sequences of different lengths, packed one after another.

    Args:
        q: (total_q, h, d).
        k: (total_k, hk, d).
        v: (total_k, hk, dv).
        cu_seqlens_q, cu_seqlens_k: int32 (b + 1,), contiguous: sequence i has the rows cu_seqlens[i] to
            cu_seqlens[i + 1], which must exist. Where one is None, that side is dense, shaped as in `flash_attn_func`.
        max_seqlen_q, max_seqlen_k: rows of the longest sequence that take part, or more; read only where cu_seqlens is
            given. Only on the CPU are they and the values of cu_seqlens checked; on a GPU results are undefined where
            these are wrong.
        seqused_q, seqused_k: int32 (b,), contiguous: only so many rows of each sequence take part. Rows of out and
            lse past seqused_q are left unwritten. Rows that take no part, those outside all sequences among them, have
            gradient 0, whatever the gradient of their out is.

    The other arguments and the errors are those of `flash_attn_func`.

    Returns:
        out (total_q, h, dv); with return_attn_probs the pair (out, lse), lse float32 (h, total_q).
    """
    if return_attn_probs is not True and return_attn_probs is not False:
        return_attn_probs = plain_bool("return_attn_probs", return_attn_probs)
    if qv is not None:
        reject_unavailable(qv=qv)
    extras = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, q_descale, k_descale, v_descale)
    lengths = (max_seqlen_q, max_seqlen_k)
    options = (*lengths, softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin)
    out, lse = attend(q, k, v, extras, options, deterministic)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """Attention of new queries over a key/value cache. Not available yet: raises NotImplementedError."""
    raise NotImplementedError(
        "flash_attn_with_kvcache is not available yet; for a dense cache, flash_attn_varlen_func with "
        "cu_seqlens_k=None and seqused_k attends to the first seqused_k rows of each sequence"
    )


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Merge the partial results of split keys. Not available yet: raises NotImplementedError."""
    raise_unavailable("flash_attn_combine")


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """Plan calls of `flash_attn_with_kvcache` ahead. Not available yet: raises NotImplementedError."""
    raise_unavailable("get_scheduler_metadata")


def round_multiple(x: int, m: int) -> int:
    """The smallest multiple of ``m`` that is not below ``x``."""
    return -(-x // m) * m


def round_up_headdim(head_size: int) -> int:
    """The tile width that a head dim runs in: the next of 64, 96, 128, 192 that this build has, else 256."""
    flags = CONFIG["build_flags"]
    return next((w for w in HEAD_DIM_TILES if head_size <= w and not flags[f"FLASHATTENTION_DISABLE_HDIM{w}"]), 256)


# -- the same calls, with the names and the argument order of FlashAttention-3's autograd functions ------------------


class _PublicFunction(torch.autograd.Function):
    """A public function in the shape of an autograd function.

    What records a call is the public function itself. torch.compile does not see that: it traces ``forward`` and, where
    a gradient is wanted, ``backward``.
    """

    @classmethod
    def apply(cls, *args):
        return cls.forward(None, *args)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "the apply of FlashAttnFunc, FlashAttnVarlenFunc and FlashAttnQKVPackedFunc has no gradient in a "
            "full graph of torch.compile: call flash_attn_func, flash_attn_varlen_func or flash_attn_qkvpacked_func"
        )


class FlashAttnFunc(_PublicFunction):
    """`flash_attn_func`."""

    @staticmethod
    def forward(ctx, *args):
        return flash_attn_func(*args)


class FlashAttnVarlenFunc(_PublicFunction):
    """`flash_attn_varlen_func`."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, *options):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
        return flash_attn_varlen_func(q, k, v, *lengths, *options)


class FlashAttnQKVPackedFunc(_PublicFunction):
    """`flash_attn_qkvpacked_func`."""

    @staticmethod
    def forward(ctx, *args):
        return flash_attn_qkvpacked_func(*args)
