"""Suite overhead: host time of one call, on tensors so small that the GPU is never waited for."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import machine, peers
from .shapes import ForwardShape
from .timing import cpu_us_per_call

SHAPE = ForwardShape(head_dim=128, causal=True, batch=1, seqlen=64, heads_q=2, heads_kv=2)


def measure(peer_names: Sequence[str]) -> dict[str, Any]:
    """Measure every entry point; returns the result file's content."""
    result = machine.describe("overhead", {"peers": list(peer_names), "shape": SHAPE.name})
    for name, build in _calls(peer_names).items():
        try:
            call = build()
            for _ in range(20):
                call()
            values = cpu_us_per_call(call)
        except Exception as error:
            if name.startswith("flash_attn"):
                raise
            row = {"name": name, "unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        else:
            row = {"name": name, "us": statistics.median(values), "least_us": min(values), "largest_us": max(values)}
            print(f"{name}: {row['us']:.1f} us", file=sys.stderr, flush=True)
        result["rows"].append(row)
    return result


def _calls(peer_names: Sequence[str]) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name -> what builds the call."""
    import flash_attn_interface

    tensors = torch.randn(3, SHAPE.batch, SHAPE.seqlen, SHAPE.heads_q, SHAPE.head_dim, device="cuda").bfloat16()
    q, k, v = tensors.unbind()
    with_gradient = q.clone().requires_grad_()
    cu_seqlens = torch.tensor([0, SHAPE.seqlen], dtype=torch.int32, device="cuda")
    packed = [x.flatten(0, 1) for x in (q, k, v)]

    def varlen() -> object:
        return flash_attn_interface.flash_attn_varlen_func(
            *packed, cu_seqlens, cu_seqlens, SHAPE.seqlen, SHAPE.seqlen, causal=True
        )

    calls: dict[str, Callable[[], Callable[[], object]]] = {
        "flash_attn_func": lambda: lambda: flash_attn_interface.flash_attn_func(q, k, v, causal=True),
        "flash_attn_func, gradient wanted": lambda: (
            lambda: flash_attn_interface.flash_attn_func(with_gradient, k, v, causal=True)
        ),
        "flash_attn_varlen_func": lambda: varlen,
        "torch.ops.flash_attn_3.fwd": lambda: lambda: torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True, num_splits=1),
    }
    # PyTorch without `sdpa_kernel`: the choice of a backend by context manager would be measured with it.
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    attention = torch.nn.functional.scaled_dot_product_attention
    calls["torch SDPA"] = lambda: lambda: attention(*heads_first, is_causal=True)
    for name in ("flex", "fa4"):
        if name in peer_names:
            calls[peers.LABELS[name]] = lambda name=name: peers.BUILDERS[name](q, k, v, SHAPE)
    return calls
