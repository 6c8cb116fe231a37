"""Suite fwd: the forward pass of each shape, this package beside its peers, timed in turns and checked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tests.reference import AttentionOptions, attention

from flash_attn_3.timing import Timing, time_in_turns

from . import bars, machine, peers
from .shapes import AttentionShape, counterpart
from .timing import matmul_tflops

#: (batch, query head) pairs whose output is compared with the reference, spread over the tensor.
CHECKED_HEADS = 3
#: A result whose relative error (Frobenius norm) exceeds this is wrong; rounding to bfloat16 leaves 2e-3 to 4e-3.
LARGEST_RELATIVE_ERROR = 1e-2
#: Names this package's call on a shape's counterpart, among the versions that take turns.
_COUNTERPART = "counterpart"


def measure(
    shapes: Sequence[AttentionShape], peer_names: Sequence[str], dtype: torch.dtype, rounds: int
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
    result["bars"] = [dataclasses.asdict(verdict) for verdict in bars.judge(result["rows"])]
    return result


def measure_shape(shape: AttentionShape, names: Sequence[str], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row: what each version reached, and how this package compares."""
    torch.manual_seed(0)
    q, k, v = _inputs(shape, dtype)
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
    other = counterpart(shape)
    if other is not None:
        calls[_COUNTERPART] = peers.BUILDERS[peers.OURS](*_inputs(other, dtype), other)
    timings = time_in_turns(calls, rounds)
    beside = {} if other is None else {"counterpart": _beside(shape, other, timings)}
    for name, entry in results.items():
        if name in timings:
            entry |= _timed(timings[name], shape)
    row = {"shape": dataclasses.asdict(shape), "name": shape.name, "results": results}
    return {**row, **_compare(shape, results), **beside}


def _inputs(shape: AttentionShape, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(size, device="cuda", dtype=dtype) for size in shape.input_shapes]


def _timed(timing: Timing, shape: AttentionShape) -> dict[str, Any]:
    tflops = shape.flops / timing.ms / 1e9
    return {"rounds_ms": timing.rounds_ms, "ms": timing.ms, "spread": timing.spread, "tflops": tflops}


def _beside(shape: AttentionShape, other: AttentionShape, timings: dict[str, Timing]) -> dict[str, Any]:
    """This package on the counterpart, and the time that a visible pair takes here in units of the time there."""
    ours, beside = timings[peers.OURS], timings[_COUNTERPART]
    pair_times = [
        timing.ms / (which.visible_pairs * which.heads_q) for timing, which in ((ours, shape), (beside, other))
    ]
    return {"name": other.name, **_timed(beside, other), "relative_pair_time": pair_times[0] / pair_times[1]}


def _checked_heads(shape: AttentionShape) -> list[tuple[int, int]]:
    last = shape.batch * shape.heads_q - 1
    flat = sorted({last * i // max(1, CHECKED_HEADS - 1) for i in range(CHECKED_HEADS)})
    return [divmod(index, shape.heads_q) for index in flat]


def _rows(x: torch.Tensor, shape: AttentionShape, sequence: int) -> torch.Tensor:
    """One sequence of q, k, v or out: (seqlen, heads, head_dim)."""
    if not shape.is_varlen:
        return x[sequence]
    begin = sum(shape.lengths[:sequence])
    return x[begin : begin + shape.lengths[sequence]]


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape) -> list[torch.Tensor]:
    """Attention in float64 for the checked heads, (seqlen, head_dim) each."""
    options = AttentionOptions(causal=shape.causal, window_size=shape.window)
    group = shape.heads_q // shape.heads_kv
    expected = []
    for sequence, head in _checked_heads(shape):
        heads = (head, head // group, head // group)
        one_head = (_rows(x, shape, sequence)[None, :, h : h + 1] for x, h in zip((q, k, v), heads, strict=True))
        out, _ = attention(*one_head, options)
        expected.append(out[0, :, 0])
    return expected


def _errors(out: torch.Tensor, expected: Sequence[torch.Tensor], shape: AttentionShape) -> dict[str, Any]:
    actual = torch.cat([_rows(out, shape, sequence)[:, head].double() for sequence, head in _checked_heads(shape)])
    exact = torch.cat(list(expected))
    relative = float((actual - exact).norm() / exact.norm())
    return {
        "max_error": float((actual - exact).abs().max()),
        "relative_error": relative,
        "wrong": not relative <= LARGEST_RELATIVE_ERROR,  # NaN is wrong, too
    }


def _compare(shape: AttentionShape, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
    """What is wrong with a result: errors too large, or below the speed that is demanded."""
    return [f"{bar['bar']}: {bar['text']}" for bar in result["bars"] if not bar["holds"]]
