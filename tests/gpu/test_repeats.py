"""The same call gives the same bits, a thousand times, also under memory pressure and beside other traffic."""

from __future__ import annotations

import pytest
import torch

import flash_attn_interface

from .cases import CAUSAL, KERNEL_MASKS, Case, each
from .harness import Tensors, check, make_tensors, run

pytestmark = pytest.mark.hardware

REPEATS = 1000
#: Part of the free GPU memory that is taken away before the repeats.
BALLAST = 0.8

CASES = [
    *(
        Case(d, dv, batch=4, seqlen_q=300, seqlen_k=500, heads_q=8, heads_kv=2, **mask.options)
        for d, dv in [(40, 40), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (64, 512)]
        for mask in KERNEL_MASKS
    ),
    *(
        Case(d, lens_q=(300, 0, 1, 200, 7), lens_k=(300, 10, 0, 400, 7), heads_q=8, heads_kv=2, **mask.options)
        for d in (64, 128)
        for mask in KERNEL_MASKS
    ),
]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def _count_differing_repeats(case: Case, tensors: Tensors, repeats: int) -> int:
    """How many of the repeats differ in a bit from the first call; compared on the device, without waiting."""
    out, lse = run(case, tensors)
    check(case, tensors, out, lse)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(repeats):
        again_out, again_lse = run(case, tensors)
        same = (_bits(again_out) == _bits(out)).all() & (_bits(again_lse) == _bits(lse)).all()
        differing += ~same
    return int(differing)


@each(CASES)
def test_r4_a_thousand_repeats(case: Case) -> None:
    assert _count_differing_repeats(case, make_tensors(case), REPEATS) == 0


@each(Case(d, batch=4, seqlen_q=1024, seqlen_k=1024, heads_q=8, heads_kv=2, **CAUSAL.options) for d in (64, 128, 256))
def test_r4_repeats_beside_other_traffic(case: Case) -> None:
    """Little memory is left, and another stream keeps the memory system busy."""
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free * BALLAST), dtype=torch.uint8, device="cuda")
    tensors = make_tensors(case)
    traffic = torch.cuda.Stream()
    half = 2**28
    with torch.cuda.stream(traffic):
        for _ in range(200):
            ballast[:half].copy_(ballast[half : 2 * half])
    try:
        assert _count_differing_repeats(case, tensors, 300) == 0
    finally:
        torch.cuda.synchronize()
        del ballast
        torch.cuda.empty_cache()


@each(Case(d, heads_q=4, heads_kv=4, seqlen_q=120, seqlen_k=330, causal=True) for d in (64, 128))
def test_result_does_not_depend_on_the_batch(case: Case) -> None:
    """A sequence alone gives the bits that it gives in a batch, dense and packed."""
    tensors = make_tensors(case.replace(batch=5))
    out, lse = run(case.replace(batch=5), tensors)
    alone = Tensors(tensors.q[3:4], tensors.k[3:4], tensors.v[3:4])
    alone_out, alone_lse = run(case.replace(batch=1), alone)
    assert torch.equal(out[3:4], alone_out)
    assert torch.equal(lse[3:4], alone_lse)


@each([Case(128, seqlen_q=130, seqlen_k=300, causal=True)])
def test_torch_compile(case: Case) -> None:
    """Traced whole, the call gives the eager bits."""
    tensors = make_tensors(case)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_interface.flash_attn_func(q, k, v, causal=True) * 2

    out, _ = run(case, tensors)
    assert torch.equal(compiled(tensors.q, tensors.k, tensors.v), out * 2)
