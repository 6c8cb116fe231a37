"""Functions to compile or export, with arguments that they can be called with."""

import shutil

import pytest
import torch

from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles CPU code with g++"),
    ),
]
OPTIONS = {"softmax_scale": 0.2, "window_size": (9, 3), "softcap": 4.0, "num_splits": 0, "sm_margin": 2}


def qkv() -> list[torch.Tensor]:
    return random_qkv((20, 30), heads=(4, 2), batch=2)


def packed() -> list[torch.Tensor]:
    offsets = torch.tensor([0, 7, 40], dtype=torch.int32), torch.tensor([0, 40, 60], dtype=torch.int32)
    return [*random_qkv((20, 30), heads=(4, 2), batch=2, packed=True), *offsets]


def call_func(q, k, v):
    return flash_attn_func(q * 2, k, v, **OPTIONS, return_attn_probs=True)


def call_func_out_only(q, k, v):
    return (flash_attn_func(q, k, v, causal=True, attention_chunk=8) + 1,)


def call_qkvpacked(qkv):
    return flash_attn_qkvpacked_func(qkv, causal=True, window_size=[5, -1], return_attn_probs=True)


def call_grouped(qkv):
    return (flash_attn_qkvpacked_func(qkv, num_heads_q=4),)


def call_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k):
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, 33, 40, causal=True, softcap=3.0, return_attn_probs=True
    )


def call_fwd(q, k, v):
    out, lse, _, _ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True, softcap=2.0)
    return out * 2, lse


def call_fwd_with_out(q, k, v):
    out = torch.zeros_like(q)
    result = torch.ops.flash_attn_3.fwd(q, k, v, out=out, window_size_left=4)
    return out, result[0] + 1, result[1]


CALLS = {
    call_func: qkv,
    call_func_out_only: qkv,
    call_qkvpacked: lambda: [torch.randn(2, 20, 3, 2, 64, generator=torch.Generator().manual_seed(0)).half()],
    call_grouped: lambda: [torch.randn(2, 20, 8, 64, generator=torch.Generator().manual_seed(0)).half()],
    call_varlen: packed,
    call_fwd: qkv,
    call_fwd_with_out: qkv,
}
