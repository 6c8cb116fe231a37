"""What the suites fwd, bwd and fwd+bwd have in common: versions of a call, checked and then timed in turns."""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flash_attn_3.timing import Timing, time_in_turns

from . import bars, machine, peers
from .shapes import AttentionShape, counterpart
from .timing import matmul_tflops

DEVICE = "cuda"
#: A result whose relative error (Frobenius norm) exceeds this is wrong; rounding to bfloat16 leaves 2e-3 to 6e-3.
LARGEST_RELATIVE_ERROR = 1e-2
#: Names this package's call on a shape's counterpart, among the versions that take turns.
_COUNTERPART = "counterpart"

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[], Tensors]


class Pass(abc.ABC):
    """What a suite times of an attention call: the forward pass, the backward pass, or both.

    Attributes:
        suite: its name.
        own: the versions that are this package's; the first is the one that is compared with the peers.
        flops: floating-point operations in units of the forward pass's.
    """

    suite: str
    own: tuple[str, ...] = (peers.OURS,)
    flops: float

    @abc.abstractmethod
    def inputs(self, shape: AttentionShape, dtype: torch.dtype) -> Tensors:
        """New random tensors."""

    @abc.abstractmethod
    def call(self, version: str, inputs: Tensors, shape: AttentionShape) -> Call:
        """What is timed; returns the results that are checked."""

    @abc.abstractmethod
    def reference(self, inputs: Tensors, shape: AttentionShape) -> Tensors:
        """A part of the exact results, in float64."""

    @abc.abstractmethod
    def checked(self, results: Tensors, shape: AttentionShape) -> Tensors:
        """The same part of a version's results."""

    @abc.abstractmethod
    def fa3_over_cudnn(self, shape: AttentionShape) -> float | None:
        """How much faster FlashAttention-3 was than cuDNN on this shape, or None where that was not measured."""

    def inspect(self, version: str, call: Call) -> dict[str, Any]:
        """What is noted of a version beside its errors, before it is timed."""
        return {}

    def describe(self, shape: AttentionShape, dtype: torch.dtype) -> dict[str, Any]:
        """What is noted of a shape."""
        return {}


def random_tensors(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Random normal numbers."""
    return [torch.randn(size, device=DEVICE, dtype=dtype) for size in sizes]


def sequence_rows(x: torch.Tensor, shape: AttentionShape, sequence: int) -> torch.Tensor:
    """One sequence of q, k, v, out or a gradient: (seqlen, heads, head_dim)."""
    if not shape.is_varlen:
        return x[sequence]
    begin = sum(shape.lengths[:sequence])
    return x[begin : begin + shape.lengths[sequence]]


def spread_heads(shape: AttentionShape, heads: int, count: int) -> list[tuple[int, int]]:
    """So many (sequence, head) pairs, from the first to the last of the tensor."""
    last = shape.batch * heads - 1
    return [divmod(index, heads) for index in sorted({last * i // max(1, count - 1) for i in range(count)})]


# -- measuring -------------------------------------------------------------------------------------------


def measure(
    what: Pass, shapes: Sequence[AttentionShape], peer_names: Sequence[str], dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Measure every shape; returns the result file's content."""
    settings = {"peers": list(peer_names), "dtype": str(dtype), "rounds": rounds}
    result = machine.describe(what.suite, settings)
    result["matmul_tflops"] = [matmul_tflops()]
    for number, shape in enumerate(shapes, start=1):
        row = measure_shape(what, shape, peer_names, dtype, rounds)
        result["rows"].append(row)
        print(f"[{number}/{len(shapes)}] {shape.name}: {_summary(row)}", file=sys.stderr, flush=True)
    result["matmul_tflops"].append(matmul_tflops())
    result["bars"] = [dataclasses.asdict(verdict) for verdict in bars.judge(what.suite, result["rows"])]
    return result


def measure_shape(
    what: Pass, shape: AttentionShape, peer_names: Sequence[str], dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """One row: what each version reached, and how this package compares."""
    torch.manual_seed(0)
    inputs = what.inputs(shape, dtype)
    expected = what.reference(inputs, shape)
    calls: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in [*what.own, *peer_names]:
        try:
            call = what.call(name, inputs, shape)
            entry = errors(what.checked(call(), shape), expected) | what.inspect(name, call)
        except Exception as error:
            if name in what.own and not isinstance(error, NotImplementedError):
                raise
            # A version that is not installed or does not take this shape is reported, not fatal.
            results[name] = {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        else:
            calls[name], results[name] = call, entry
    other = counterpart(shape)
    if other is not None and peers.OURS in calls:
        calls[_COUNTERPART] = what.call(peers.OURS, what.inputs(other, dtype), other)
    timings = time_in_turns(calls, rounds)
    for name, entry in results.items():
        if name in timings:
            entry |= _timed(timings[name], shape.flops * what.flops)
    row = {"shape": dataclasses.asdict(shape), "name": shape.name, "results": results}
    row |= _compare(results, what.fa3_over_cudnn(shape)) | what.describe(shape, dtype)
    if _COUNTERPART in timings:
        row["counterpart"] = _beside(shape, other, timings, other.flops * what.flops)
    return row


def errors(actual: Tensors, expected: Tensors) -> dict[str, Any]:
    """Of the worst among these results."""
    pairs = [(one.double(), exact) for one, exact in zip(actual, expected, strict=True)]
    relative = torch.stack([(one - exact).norm() / exact.norm() for one, exact in pairs]).max().item()
    return {
        "max_error": torch.stack([(one - exact).abs().max() for one, exact in pairs]).max().item(),
        "relative_error": relative,
        "wrong": not relative <= LARGEST_RELATIVE_ERROR,  # NaN is wrong, too
    }


def _timed(timing: Timing, flops: float) -> dict[str, Any]:
    tflops = flops / timing.ms / 1e9
    return {"rounds_ms": timing.rounds_ms, "ms": timing.ms, "spread": timing.spread, "tflops": tflops}


def _beside(shape: AttentionShape, other: AttentionShape, timings: dict[str, Timing], flops: float) -> dict[str, Any]:
    """This package on the counterpart, and the time that a visible pair takes here in units of the time there."""
    ours, beside = timings[peers.OURS], timings[_COUNTERPART]
    pair_times = [
        timing.ms / (which.visible_pairs * which.heads_q) for timing, which in ((ours, shape), (beside, other))
    ]
    return {"name": other.name, **_timed(beside, flops), "relative_pair_time": pair_times[0] / pair_times[1]}


def _compare(results: dict[str, dict[str, Any]], fa3_over_cudnn: float | None) -> dict[str, Any]:
    """Ratios of this package to each other version, and to the front: the best of cuDNN, FlashAttention-4 and -3."""
    tflops = {name: entry["tflops"] for name, entry in results.items() if "tflops" in entry}
    ours = tflops.pop(peers.OURS, None)
    if fa3_over_cudnn is not None and "cudnn" in tflops:
        tflops["fa3"] = tflops["cudnn"] * fa3_over_cudnn
    row: dict[str, Any] = {"fa3_equivalent_tflops": tflops.get("fa3"), "ratios": {}}
    if ours is None:
        return row
    row["ratios"] = {name: ours / value for name, value in tflops.items()}
    candidates = {name: tflops[name] for name in ("fa3", "cudnn", "fa4") if name in tflops}
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
