"""Arguments of the runtime's backward pass, made of tensors without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_cuda
from fake_cuda import CUDA, FP32, INT32
from forward_calls import library

NAMES = ("dout", "q", "k", "v", "out", "lse", "dlse", "statistics", "dq", "dk", "dv")
INDEX_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
TENSORS = (*NAMES, *INDEX_NAMES, "dq_scratch", "key_parts")
#: Far apart, in the order of `TENSORS`.
ADDRESSES = {name: 0x7F00_0000_0000 + (number << 32) for number, name in enumerate(TENSORS)}
OPTIONS = {
    "group_parts": 1,
    "num_ctas": 10,
    "heads_per_section": 2,
    "least_heads_in_last_section": 1,
    "softmax_scale": 0.125,
    "score_scale": 0.5,
    "exp2_scale": 0.25,
    "window_left": 3,
    "window_right": -1,
    "attention_chunk": 9,
}
BLOCK_M, BLOCK_N = 64, 128


def load(path: Path | None = None, *, varlen: bool = False, takes_turns: bool = False, **changes: Any) -> int:
    """Kernels of a tile of 64 queries and 128 keys, for head dims up to 128."""
    traits = {
        "cubin": b"cubin",
        "symbol": "bwd",
        "num_threads": 384,
        "smem_bytes": 200_000,
        "preprocess_threads": 256,
        "postprocess_threads": 192,
        "head_dim": 64,
        "head_dim_v": 128,
        "block_m": BLOCK_M,
        "block_n": BLOCK_N,
        "cluster_size": 1,
        "num_dq_parts": 2,
        "qk_box_columns": 32,
        "vo_box_columns": 64,
        "key_gradient_rows": 64,
        "varlen": varlen,
        "takes_turns": takes_turns,
        "nvcc_release": 13000,
    }
    return library(path).backward_load(*(traits | changes).values())


def dense_shapes(
    batch: int = 2, seqlen_q: int = 300, seqlen_k: int = 200, heads_q: int = 6, heads_kv: int = 3
) -> dict[str, tuple]:
    """Head dims 40 and 128; name -> shape and, where not bf16, dtype."""
    q, k = (batch, seqlen_q, heads_q, 40), (batch, seqlen_k, heads_kv, 40)
    v, out, lse = (*k[:3], 128), (*q[:3], 128), ((batch, heads_q, seqlen_q), FP32)
    blocks = -(-seqlen_q // BLOCK_M)
    return {
        **{"dout": (out,), "q": (q,), "k": (k,), "v": (v,), "out": (out,), "lse": lse, "dlse": lse},
        "statistics": ((2, batch, heads_q, blocks * BLOCK_M), FP32),
        **{"dq": (q,), "dk": (k,), "dv": (v,)},
        "dq_scratch": ((batch * heads_q * blocks * (BLOCK_M * 64 + 2),), FP32),
    }


def packed_shapes(heads_q: int = 6) -> dict[str, tuple]:
    """The same with cu_seqlens: 3 sequences, 500 queries and 400 keys in total."""
    q, k, v, out = (500, heads_q, 40), (400, 3, 40), (400, 3, 128), (500, heads_q, 128)
    lse = ((heads_q, 500), FP32)
    rows = -(-(500 + 3 * BLOCK_M) // BLOCK_M) * BLOCK_M
    return {
        **{"dout": (out,), "q": (q,), "k": (k,), "v": (v,), "out": (out,), "lse": lse, "dlse": lse},
        "statistics": ((2, heads_q, rows), FP32),
        **{"dq": (q,), "dk": (k,), "dv": (v,)},
        "cu_seqlens_q": ((4,), INT32),
        "cu_seqlens_k": ((4,), INT32),
        "dq_scratch": ((heads_q * rows * 64 + heads_q * rows // BLOCK_M * 2,), FP32),
    }


def tensors(shapes: dict[str, tuple | None], device: int = 0) -> dict[str, Any]:
    """The tensors of a call; a third entry of a shape is the strides."""

    def make(name: str, shape: tuple, dtype: Any = fake_cuda.BF16, strides: Any = None, on: Any = (CUDA, device)):
        return fake_cuda.tensor(shape, dtype, strides=strides, address=ADDRESSES[name], device=on)

    given = {name: make(name, *shape) for name, shape in shapes.items() if shape is not None}
    return {name: given.get(name) for name in TENSORS}


def backward(arguments: dict[str, Any], handle: int, path: Path | None = None, **options: Any) -> None:
    """One call of a launcher made for it."""
    launcher = library(path).backward_launcher(handle, *(OPTIONS | options).values())
    launcher(*(arguments[name] for name in TENSORS))
