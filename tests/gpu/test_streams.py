"""Streams, devices, CUDA graphs (G1, G3 to G6), for the forward pass and for both passes together."""

from __future__ import annotations

import pytest
import torch

from .calls import Call, Results, make_call
from .cases import CAUSAL, FULL, KERNEL_MASKS, Case, GradientCase, each
from .harness import make_tensors, run

pytestmark = pytest.mark.hardware

#: Long enough that work queued behind it has not begun when the host goes on.
SLEEP_CYCLES = 50_000_000
#: Head dims and modes of gradients: every way in which warpgroups share a tile, and both orders of additions.
GRADIENTS = [
    {"head_dim": 64},
    {"head_dim": 128, "deterministic": True},
    {"head_dim": 192, "head_dim_v": 128},
    {"head_dim": 192},
    {"head_dim": 256, "deterministic": True},
]


@each(
    [
        *(Case(d, seqlen_q=300, seqlen_k=300, **mask.options) for d in (64, 128) for mask in KERNEL_MASKS),
        *(GradientCase(seqlen_q=300, seqlen_k=300, with_dlse=True, **CAUSAL.options, **call) for call in GRADIENTS),
    ]
)
def test_g5_side_stream(case: Case) -> None:
    """G5: kernels run on the current stream, behind the copies that fill their inputs there."""
    call = make_call(case)
    late = call.map(lambda x: torch.full_like(x, float("nan")), case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run()  # loads the kernels and fills the stream's memory pool
        torch.cuda._sleep(SLEEP_CYCLES)
        _copy_inputs(late, call)
        results = late.run()
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    call.check(results)


@each(
    [
        Case(128, batch=1, seqlen_q=1000, seqlen_k=1000, causal=True),
        *(GradientCase(batch=1, seqlen_q=1000, seqlen_k=1000, **CAUSAL.options, **call) for call in GRADIENTS),
    ]
)
def test_g5_two_streams_at_once(case: Case) -> None:
    """Calls on different streams share nothing."""
    calls = [make_call(case.replace(seed=seed)) for seed in range(8)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for call, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(5):
                result = call.run()
            results.append(result)
    torch.cuda.synchronize()
    for call, result in zip(calls, results, strict=True):
        call.check(result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each(
    [
        *(Case(d, seqlen_q=200, seqlen_k=300, causal=True) for d in (64, 128)),
        Case(128, lens_q=(5, 90), lens_k=(70, 200)),
        *(GradientCase(seqlen_q=200, seqlen_k=300, with_dlse=True, **call) for call in GRADIENTS),
        GradientCase(128, lens_q=(5, 90), lens_k=(70, 200)),
    ]
)
def test_g6_tensors_on_another_device(case: Case) -> None:
    """G6: tensors on cuda:1 while the current device is 0; and back."""
    assert torch.cuda.current_device() == 0
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        call = make_call(case, device)
        results = call.run()
        assert all(x.device == torch.device(device) for x in results)
        assert torch.cuda.current_device() == 0
        call.check(results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each([Case(128)])
def test_g6_tensors_on_two_devices(case: Case) -> None:
    tensors = make_tensors(case, "cuda:0")
    tensors.v = tensors.v.to("cuda:1")
    with pytest.raises((ValueError, RuntimeError), match=r"\bv\b"):
        run(case, tensors)


@each(
    [
        *(Case(d, seqlen_q=257, seqlen_k=300, **mask.options) for d in (64, 128, 256) for mask in KERNEL_MASKS),
        *(GradientCase(seqlen_q=257, seqlen_k=300, with_dlse=True, **CAUSAL.options, **call) for call in GRADIENTS),
    ]
)
def test_cuda_graph(case: Case) -> None:
    """A captured call computes from what its inputs hold at replay."""
    static = make_call(case)
    graph, results = _capture(static)
    for seed in (1, 2, 3):
        _replay_and_check(graph, static, results, make_call(case.replace(seed=seed)))


@each(
    [
        *(
            Case(d, lens_q=(300, 300, 300), lens_k=(400, 400, 400), used_q=(0, 0, 0), used_k=(0, 0, 0), **mask.options)
            for d in (64, 128)
            for mask in KERNEL_MASKS
        ),
        *(
            GradientCase(
                lens_q=(300, 300, 300), lens_k=(400, 400, 400), used_q=(0, 0, 0), used_k=(0, 0, 0), causal=True, **call
            )
            for call in GRADIENTS
        ),
    ]
)
def test_g1_g4_lengths_change_between_replays(case: Case) -> None:
    """G1, G4: captured with all lengths zero, replayed with long, short and no sequences."""
    static = make_call(case)
    graph, results = _capture(static)
    lengths = [
        ((300, 300, 300), (400, 400, 400)),
        ((0, 1, 129), (400, 0, 64)),
        ((0, 0, 0), (0, 0, 0)),
        ((7, 0, 300), (1, 1, 399)),
    ]
    for used_q, used_k in lengths * 3:
        _replay_and_check(graph, static, results, make_call(case.replace(used_q=used_q, used_k=used_k)))


@each(
    [
        *(Case(d, lens_q=(900, 0, 0), lens_k=(1200, 0, 0), **mask.options) for d in (64, 128) for mask in KERNEL_MASKS),
        *(GradientCase(lens_q=(900, 0, 0), lens_k=(1200, 0, 0), causal=True, **call) for call in GRADIENTS),
    ]
)
def test_g1_offsets_change_between_replays(case: Case) -> None:
    """G1: captured with all tokens in one sequence, replayed with others of the same tokens."""
    static = make_call(case)
    graph, results = _capture(static)
    lengths = [((300, 300, 300), (400, 400, 400)), ((1, 0, 899), (0, 1200, 0)), ((0, 0, 900), (0, 1, 1199))]
    for lens_q, lens_k in lengths * 3:
        _replay_and_check(graph, static, results, make_call(case.replace(lens_q=lens_q, lens_k=lens_k)))


@each(
    [
        Case(128, seqlen_q=500, seqlen_k=500, causal=True),
        *(GradientCase(d, seqlen_q=500, seqlen_k=700, causal=True, deterministic=True) for d in (64, 128, 192, 256)),
    ]
)
def test_g2_g3_a_thousand_replays(case: Case) -> None:
    """G2, G3: what counts tiles and turns begins anew in each replay."""
    call = make_call(case)
    graph, results = _capture(call)
    graph.replay()
    first = [x.clone() for x in results]
    for _ in range(1000):
        graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(first, results, strict=True))
    call.check(results)


def _capture(call: Call) -> tuple[torch.cuda.CUDAGraph, Results]:
    call.run()  # loads the kernels: a module cannot be loaded during capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run()
    return graph, results


def _replay_and_check(graph: torch.cuda.CUDAGraph, static: Call, results: Results, fresh: Call) -> None:
    """Replay with the inputs of another call, which judges the results."""
    _copy_inputs(static, fresh)
    for x in results:
        x.fill_(float("nan"))
    graph.replay()
    fresh.check(results)


def _copy_inputs(to: Call, source: Call) -> None:
    for x, y in zip(to.inputs(), source.inputs(), strict=True):
        x.copy_(y)


@each(
    [
        Case(128, seqlen_q=100, seqlen_k=100, **FULL.options),
        *(GradientCase(seqlen_q=100, seqlen_k=100, **call) for call in GRADIENTS),
    ]
)
def test_the_call_does_not_synchronise(case: Case) -> None:
    call = make_call(case)
    call.run()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    event = torch.cuda.Event()
    event.record()
    call.run()
    assert not event.query(), "the call waited for the device"
