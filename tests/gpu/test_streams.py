"""Streams, devices, CUDA graphs (G1, G5, G6)."""

from __future__ import annotations

import pytest
import torch

from .cases import FULL, KERNEL_MASKS, Case, each
from .harness import Tensors, check, make_tensors, run

pytestmark = pytest.mark.hardware

#: Long enough that work queued behind it has not begun when the host goes on.
SLEEP_CYCLES = 50_000_000


@each(Case(d, seqlen_q=300, seqlen_k=300, **mask.options) for d in (64, 128) for mask in KERNEL_MASKS)
def test_g5_side_stream(case: Case) -> None:
    """G5: the kernel runs on the current stream, behind the copies that fill its inputs there."""
    tensors = make_tensors(case)
    late = Tensors(*(torch.full_like(getattr(tensors, name), float("nan")) for name in ("q", "k", "v")))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, tensors)  # loads the kernel and fills the stream's memory pool
        torch.cuda._sleep(SLEEP_CYCLES)
        for name in ("q", "k", "v"):
            getattr(late, name).copy_(getattr(tensors, name))
        out, lse = run(case, late)
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    check(case, tensors, out, lse)


@each([Case(128, batch=1, seqlen_q=1000, seqlen_k=1000, causal=True)])
def test_g5_two_streams_at_once(case: Case) -> None:
    """Calls on different streams share nothing."""
    cases = [case.replace(seed=seed) for seed in range(8)]
    inputs = [make_tensors(call) for call in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = []
    for call, tensors, stream in zip(cases, inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(5):
                result = run(call, tensors)
            results.append(result)
    torch.cuda.synchronize()
    for call, tensors, result in zip(cases, inputs, results, strict=True):
        check(call, tensors, *result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each(
    [Case(d, seqlen_q=200, seqlen_k=300, causal=True) for d in (64, 128)]
    + [Case(128, lens_q=(5, 90), lens_k=(70, 200))]
)
def test_g6_tensors_on_another_device(case: Case) -> None:
    """G6: tensors on cuda:1 while the current device is 0; and back."""
    assert torch.cuda.current_device() == 0
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        tensors = make_tensors(case, device)
        out, lse = run(case, tensors)
        assert out.device == lse.device == torch.device(device)
        assert torch.cuda.current_device() == 0
        check(case, tensors, out, lse)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each([Case(128)])
def test_g6_tensors_on_two_devices(case: Case) -> None:
    tensors = make_tensors(case, "cuda:0")
    tensors.v = tensors.v.to("cuda:1")
    with pytest.raises((ValueError, RuntimeError), match=r"\bv\b"):
        run(case, tensors)


@each(Case(d, seqlen_q=257, seqlen_k=300, **mask.options) for d in (64, 128, 256) for mask in KERNEL_MASKS)
def test_cuda_graph(case: Case) -> None:
    """A captured call computes from what its inputs hold at replay."""
    static, graph, (out, lse) = _capture(case)
    for seed in (1, 2, 3):
        fresh = make_tensors(case.replace(seed=seed))
        for name in ("q", "k", "v"):
            getattr(static, name).copy_(getattr(fresh, name))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        check(case, fresh, out, lse)


@each(
    Case(d, lens_q=(300, 300, 300), lens_k=(400, 400, 400), used_q=(0, 0, 0), used_k=(0, 0, 0), **mask.options)
    for d in (64, 128)
    for mask in KERNEL_MASKS
)
def test_g1_g4_lengths_change_between_replays(case: Case) -> None:
    """G1, G4: captured with all lengths zero, replayed with long, short and no sequences."""
    static, graph, (out, lse) = _capture(case)
    lengths = [
        ((300, 300, 300), (400, 400, 400)),
        ((0, 1, 129), (400, 0, 64)),
        ((0, 0, 0), (0, 0, 0)),
        ((7, 0, 300), (1, 1, 399)),
    ]
    for used_q, used_k in lengths * 3:
        fresh_case = case.replace(used_q=used_q, used_k=used_k)
        fresh = make_tensors(fresh_case)
        for name in ("q", "k", "v", "seqused_q", "seqused_k"):
            getattr(static, name).copy_(getattr(fresh, name))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        check(fresh_case, fresh, out, lse)


@each([Case(128, seqlen_q=500, seqlen_k=500, causal=True)])
def test_g3_a_thousand_replays(case: Case) -> None:
    static, graph, (out, lse) = _capture(case)
    graph.replay()
    first_out, first_lse = out.clone(), lse.clone()
    for _ in range(1000):
        graph.replay()
    assert torch.equal(out, first_out)
    assert torch.equal(lse, first_lse)
    check(case, static, out, lse)


def _capture(case: Case) -> tuple[Tensors, torch.cuda.CUDAGraph, tuple[torch.Tensor, torch.Tensor]]:
    static = make_tensors(case)
    run(case, static)  # loads the kernel: a module cannot be loaded during capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(case, static)
    return static, graph, result


@each([Case(128, seqlen_q=100, seqlen_k=100, **FULL.options)])
def test_the_call_does_not_synchronise(case: Case) -> None:
    tensors = make_tensors(case)
    run(case, tensors)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    event = torch.cuda.Event()
    event.record()
    run(case, tensors)
    assert not event.query(), "the call waited for the device"
