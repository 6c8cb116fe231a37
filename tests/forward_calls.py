"""Arguments of the runtime's forward pass, made of tensors without memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import fake_cuda
from fake_cuda import CUDA, FP32, INT32
from flash_attn_3 import runtime

Q_ADDRESS, K_ADDRESS, V_ADDRESS, OUT_ADDRESS = (0x7F00_0000_0000 + (i << 32) for i in range(4))
TENSORS = ("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "promoted_out")
LSE_ADDRESS, INDEX_ADDRESS = 0x7F10_0000_0004, 0x7F20_0000_0004


@functools.cache
def library(path: Path | None = None) -> runtime.RuntimeLibrary:
    """The functions of the library at `path`, by default of the one built from this repository's sources."""
    return runtime.load_library(path or fake_cuda.runtime_library())


def dense_call(device: int = 0, **changes: Any) -> dict[str, Any]:
    """The arguments of a valid forward call: batch 2, 5 queries, 7 keys, 6 and 3 heads, head dims 64 and 128.

    Without a handle it has no CTA, and needs no kernel; only what concerns tensor maps is not checked then.
    """
    on = {"device": (CUDA, device)}
    arguments = {
        "handle": -1,
        "q": fake_cuda.tensor((2, 5, 6, 64), address=Q_ADDRESS, **on),
        "k": fake_cuda.tensor((2, 7, 3, 64), address=K_ADDRESS, **on),
        "v": fake_cuda.tensor((2, 7, 3, 128), address=V_ADDRESS, **on),
        "out": fake_cuda.tensor((2, 5, 6, 128), address=OUT_ADDRESS, **on),
        "lse": fake_cuda.tensor((2, 6, 5), FP32, address=LSE_ADDRESS, **on),
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "seqused_q": None,
        "seqused_k": None,
        "promoted_out": None,
        "max_seqlen_q": 5,
        "max_seqlen_k": 7,
        "num_ctas": 4 if "handle" in changes else 0,
        "packed_heads": 2,
        "num_value_passes": 1,
        "heads_per_section": 6,
        "least_heads_in_last_section": 5,
        "score_scale": 0.5,
        "exp2_scale": 0.25,
        "window_left": 3,
        "window_right": -1,
        "attention_chunk": 9,
    }
    return arguments | changes


def packed_call(device: int = 0, **changes: Any) -> dict[str, Any]:
    """The same with cu_seqlens: 3 sequences, 11 queries and 13 keys in total, the longest 6 and 8."""
    on = {"device": (CUDA, device)}
    packed = {
        "q": fake_cuda.tensor((11, 6, 64), address=Q_ADDRESS, **on),
        "k": fake_cuda.tensor((13, 3, 64), address=K_ADDRESS, **on),
        "v": fake_cuda.tensor((13, 3, 128), address=V_ADDRESS, **on),
        "out": fake_cuda.tensor((11, 6, 128), address=OUT_ADDRESS, **on),
        "lse": fake_cuda.tensor((6, 11), FP32, address=LSE_ADDRESS, **on),
        "cu_seqlens_q": fake_cuda.tensor((4,), INT32, address=INDEX_ADDRESS, **on),
        "cu_seqlens_k": fake_cuda.tensor((4,), INT32, address=INDEX_ADDRESS + 64, **on),
        "max_seqlen_q": 6,
        "max_seqlen_k": 8,
    }
    return dense_call(device, **(packed | changes))


def forward(arguments: dict[str, Any], path: Path | None = None) -> None:
    """One call of a launcher made for it."""
    options = [value for name, value in arguments.items() if name not in TENSORS]
    library(path).forward_launcher(*options)(*(arguments[name] for name in TENSORS))
