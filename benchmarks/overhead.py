"""Suite overhead: host time of one call, on tensors so small that the GPU is never waited for."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import machine, peers
from .backward import ForwardBackward
from .shapes import AttentionShape
from .timing import cpu_us_per_call

DEVICE = "cuda"
SHAPE = AttentionShape(head_dim=128, causal=True, batch=1, seqlen=64, heads_q=2, heads_kv=2)
#: Row -> the most host time that a call may take, in microseconds.
LARGEST_US = {
    "flash_attn_func": 15.0,
    "flash_attn_varlen_func": 20.0,
    "flash_attn_func, forward and backward": 80.0,
}


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
            if name.startswith(("flash_attn", "part")):
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

    q, k, v, dout = torch.randn(4, SHAPE.batch, SHAPE.seqlen, SHAPE.heads_q, SHAPE.head_dim, device=DEVICE).bfloat16()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, SHAPE.seqlen], dtype=torch.int32, device=DEVICE)
    packed = [x.flatten(0, 1) for x in (q, k, v)]

    def varlen() -> object:
        return flash_attn_interface.flash_attn_varlen_func(
            *packed, cu_seqlens, cu_seqlens, SHAPE.seqlen, SHAPE.seqlen, causal=True
        )

    def forward_and_backward(deterministic: bool) -> Callable[[], object]:
        def call() -> object:
            out = flash_attn_interface.flash_attn_func(*leaves, causal=True, deterministic=deterministic)
            return torch.autograd.grad(out, leaves, dout)

        return call

    calls: dict[str, Callable[[], Callable[[], object]]] = {
        "flash_attn_func": lambda: lambda: flash_attn_interface.flash_attn_func(q, k, v, causal=True),
        "flash_attn_func, gradient wanted": lambda: (
            lambda: flash_attn_interface.flash_attn_func(leaves[0], k, v, causal=True)
        ),
        "flash_attn_func, forward and backward": lambda: forward_and_backward(deterministic=False),
        "flash_attn_func, forward and backward, deterministic": lambda: forward_and_backward(deterministic=True),
        "flash_attn_varlen_func": lambda: varlen,
        "torch.ops.flash_attn_3.fwd": lambda: lambda: torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True, num_splits=1),
        **_parts(q, k, v, dout),
    }
    # PyTorch without `sdpa_kernel`: the choice of a backend by context manager would be measured with it.
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    leaves_heads_first = [x.transpose(1, 2) for x in leaves]
    attention = torch.nn.functional.scaled_dot_product_attention
    calls["torch SDPA"] = lambda: lambda: attention(*heads_first, is_causal=True)
    calls["torch SDPA, forward and backward"] = lambda: (
        lambda: torch.autograd.grad(attention(*leaves_heads_first, is_causal=True).transpose(1, 2), leaves, dout)
    )
    for name in ("flex", "fa4"):
        if name in peer_names:
            label = peers.LABELS[name]
            calls[label] = lambda name=name: peers.BUILDERS[name](q, k, v, SHAPE)
            calls[f"{label}, forward and backward"] = lambda name=name: ForwardBackward().call(
                name, (*leaves, dout), SHAPE
            )
    return calls


def _parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    """What a call of flash_attn_func is made of, in the order of a call, and its backward pass below autograd."""
    from flash_attn_3 import dispatch, launch, runtime
    from flash_attn_3.signature import NO_EXTRAS, ForwardOptions, forward_signature

    options = ForwardOptions(causal=SHAPE.causal)
    prepared = launch.prepare_forward(forward_signature(q, k, v, NO_EXTRAS, options))
    tensors = (q, k, v, prepared.new_out(), prepared.new_lse(), None, None, None, None, None)
    # Without a CTA the tensors are converted and checked, and the driver is not asked for anything.
    checks = runtime.forward_launcher(
        handle=0,
        max_seqlen_q=SHAPE.seqlen,
        max_seqlen_k=SHAPE.seqlen,
        num_ctas=0,
        packed_heads=1,
        num_value_passes=1,
        heads_per_section=1,
        least_heads_in_last_section=1,
        score_scale=1.0,
        exp2_scale=1.0,
        window_left=-1,
        window_right=0,
        attention_chunk=0,
    )

    def allocations() -> object:
        return prepared.new_out(), prepared.new_lse()

    out, lse = dispatch.forward(q, k, v, NO_EXTRAS, options)

    def backward() -> object:
        return dispatch.backward(dout, None, q, k, v, out, lse, options=options)

    return {
        "part: below autograd": lambda: lambda: dispatch.forward(q, k, v, NO_EXTRAS, options),
        "part: the runtime's launch": lambda: lambda: prepared.run(*tensors),
        "part: the launch but for the driver": lambda: lambda: checks(*tensors),
        "part: allocation of out and lse": lambda: allocations,
        "part: backward below autograd": lambda: backward,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Which calls take more host time than they may."""
    return [
        f"{row['name']}: {row['us']:.2f} us, at most {LARGEST_US[row['name']]:.0f} is wanted"
        for row in result["rows"]
        if row["name"] in LARGEST_US and row["us"] > LARGEST_US[row["name"]]
    ]
