"""Suite fwd: the forward pass of each shape, this package beside its peers, timed in turns and checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tests.reference import AttentionOptions, attention

from flash_attn_3.timing import time_in_turns

from . import machine, peers
from .shapes import LEAST_CUDNN_RATIO, SETS, ForwardShape
from .timing import matmul_tflops

#: (batch, query head) pairs whose output is compared with the reference, spread over the tensor.
CHECKED_HEADS = 3
#: A result whose relative error (Frobenius norm) exceeds this is wrong; rounding to bfloat16 leaves 2e-3 to 4e-3.
LARGEST_RELATIVE_ERROR = 1e-2


def measure(
    shapes: Sequence[ForwardShape], peer_names: Sequence[str], dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Measure every shape; returns the result file's content."""
    settings = {"peers": list(peer_names), "dtype": str(dtype), "rounds": rounds}
    result = machine.describe("fwd", settings)
    result["matmul_tflops"] = [matmul_tflops()]
    for number, shape in enumerate(shapes, start=1):
        row = measure_shape(shape, [peers.OURS, *peer_names], dtype, rounds)
        result["rows"].append(row)
        print(f"[{number}/{len(shapes)}] {shape.name}: {_summary(row)}", file=sys.stderr, flush=True)
    result["matmul_tflops"].append(matmul_tflops())
    return result


def measure_shape(shape: ForwardShape, names: Sequence[str], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row: what each version reached, and how this package compares."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(shape.batch, shape.seqlen, heads, shape.head_dim, device="cuda", dtype=dtype)
        for heads in (shape.heads_q, shape.heads_kv, shape.heads_kv)
    )
    expected = _reference(q, k, v, shape)
    calls: dict[str, peers.Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            call = peers.BUILDERS[name](q, k, v, shape)
            errors = _errors(call(), expected, shape)
        except Exception as error:
            if name == peers.OURS:
                raise
            # A peer that is not installed or does not take this shape is reported, not fatal.
            results[name] = {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        calls[name], results[name] = call, errors
    for name, timing in time_in_turns(calls, rounds).items():
        results[name] |= {
            "rounds_ms": timing.rounds_ms,
            "ms": timing.ms,
            "spread": timing.spread,
            "tflops": shape.flops / timing.ms / 1e9,
        }
    return {"shape": dataclasses.asdict(shape), "name": shape.name, "results": results, **_compare(shape, results)}


def _checked_heads(shape: ForwardShape) -> list[tuple[int, int]]:
    last = shape.batch * shape.heads_q - 1
    flat = sorted({last * i // max(1, CHECKED_HEADS - 1) for i in range(CHECKED_HEADS)})
    return [divmod(index, shape.heads_q) for index in flat]


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: ForwardShape) -> list[torch.Tensor]:
    """Attention in float64 for the checked heads, (seqlen, head_dim) each."""
    options = AttentionOptions(causal=shape.causal)
    group = shape.heads_q // shape.heads_kv
    expected = []
    for sequence, head in _checked_heads(shape):
        kv_head = head // group
        out, _ = attention(
            q[sequence : sequence + 1, :, head : head + 1],
            k[sequence : sequence + 1, :, kv_head : kv_head + 1],
            v[sequence : sequence + 1, :, kv_head : kv_head + 1],
            options,
        )
        expected.append(out[0, :, 0])
    return expected


def _errors(out: torch.Tensor, expected: Sequence[torch.Tensor], shape: ForwardShape) -> dict[str, Any]:
    actual = torch.stack([out[sequence, :, head].double() for sequence, head in _checked_heads(shape)])
    exact = torch.stack(list(expected))
    relative = float((actual - exact).norm() / exact.norm())
    return {
        "max_error": float((actual - exact).abs().max()),
        "relative_error": relative,
        "wrong": not relative <= LARGEST_RELATIVE_ERROR,  # NaN is wrong, too
    }


def _compare(shape: ForwardShape, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of this package to each peer, and to the front: the best of cuDNN, FlashAttention-4 and -3."""
    tflops = {name: entry["tflops"] for name, entry in results.items() if "tflops" in entry}
    ours = tflops.pop(peers.OURS)
    ratio = peers.fa3_over_cudnn(shape)
    if ratio is not None and "cudnn" in tflops:
        tflops["fa3"] = tflops["cudnn"] * ratio
    candidates = {name: tflops[name] for name in ("fa3", "cudnn", "fa4") if name in tflops}
    row: dict[str, Any] = {"fa3_equivalent_tflops": tflops.get("fa3")}
    row["ratios"] = {name: ours / value for name, value in tflops.items()}
    if candidates:
        best = max(candidates, key=candidates.__getitem__)
        row["front"] = {"name": best, "tflops": candidates[best], "ratio": ours / candidates[best]}
    return row


def _summary(row: dict[str, Any]) -> str:
    parts = []
    for name, entry in row["results"].items():
        if "tflops" in entry:
            wrong = " WRONG" if entry["wrong"] else ""
            parts.append(f"{name} {entry['tflops']:.0f} (±{entry['spread'] / 2:.1%}){wrong}")
        else:
            parts.append(f"{name} unavailable")
    return ", ".join(parts)


def failures(result: dict[str, Any]) -> list[str]:
    """What is wrong with a result: errors too large, or below the speed that the set "bars" demands."""
    found = []
    bars = {shape.name: LEAST_CUDNN_RATIO[shape.head_dim] for shape in SETS["bars"]}
    for row in result["rows"]:
        if row["results"][peers.OURS]["wrong"]:
            found.append(f"{row['name']}: relative error {row['results'][peers.OURS]['relative_error']:.1e}")
        least, ratio = bars.get(row["name"]), row["ratios"].get("cudnn")
        if least is not None and ratio is not None and ratio < least:
            found.append(f"{row['name']}: {ratio:.3f} x cuDNN, at least {least} is wanted")
    return found
