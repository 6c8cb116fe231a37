"""The autograd functions of the public interface, with FlashAttention-3's argument order.

The forward pass is here; the backward pass is not there yet and says so when it is asked for.
"""

from __future__ import annotations

import torch

from .arguments import split_qkv
from .ops import NO_BACKWARD, attend


class _ForwardOnly(torch.autograd.Function):
    """Subclasses write their forward pass as ``compute``: `apply` records it, calling ``compute`` does not."""

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(NO_BACKWARD)


class FlashAttnFunc(_ForwardOnly):
    """`flash_attn_func` on tensors that require a gradient."""

    @staticmethod
    def compute(
        q,
        k,
        v,
        softmax_scale,
        causal,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_softmax=False,
    ):
        out, lse = attend(
            q,
            k,
            v,
            qv,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
        )
        return (out, lse) if return_softmax else out

    @staticmethod
    def forward(ctx, *args):
        return FlashAttnFunc.compute(*args)


class FlashAttnVarlenFunc(_ForwardOnly):
    """`flash_attn_varlen_func` on tensors that require a gradient."""

    @staticmethod
    def compute(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_softmax=False,
    ):
        out, lse = attend(
            q,
            k,
            v,
            qv,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
        )
        return (out, lse) if return_softmax else out

    @staticmethod
    def forward(ctx, *args):
        return FlashAttnVarlenFunc.compute(*args)


class FlashAttnQKVPackedFunc(_ForwardOnly):
    """`flash_attn_qkvpacked_func` on a tensor that requires a gradient."""

    @staticmethod
    def compute(
        qkv,
        softmax_scale,
        causal,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_softmax=False,
    ):
        out, lse = attend(
            *split_qkv(qkv, num_heads_q),
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            attention_chunk=attention_chunk,
            softcap=softcap,
            sm_margin=sm_margin,
        )
        return (out, lse) if return_softmax else out

    @staticmethod
    def forward(ctx, *args):
        return FlashAttnQKVPackedFunc.compute(*args)
