"""The same call gives the same bits, a thousand times, also under memory pressure and beside other traffic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flash_attn_interface

from .calls import Call, Results, make_call
from .cases import CAUSAL, FULL, KERNEL_MASKS, WINDOW, Case, GradientCase, each
from .gradients import Incoming
from .harness import Tensors, make_tensors, run, sm_margin
from .repeats import check_repeats, no_memory_caching, other_traffic

pytestmark = pytest.mark.hardware

REPEATS = 1000
FORWARD_CASES = [
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
#: Every way in which warpgroups share a tile, in both modes; enough blocks of keys that the order of additions shows.
GRADIENT_TILES = [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)]
GRADIENT_CASES = [
    *(
        GradientCase(
            d, dv, batch=2, seqlen_q=300, seqlen_k=700, heads_kv=1, deterministic=deterministic, **mask.options
        )
        for d, dv in GRADIENT_TILES
        for deterministic, mask in [(True, FULL), (True, CAUSAL), (True, WINDOW), (False, CAUSAL)]
    ),
    *(
        GradientCase(
            d,
            dv,
            lens_q=(300, 0, 1, 200, 7),
            lens_k=(300, 10, 0, 700, 7),
            heads_q=8,
            deterministic=deterministic,
            **WINDOW.options,
        )
        for d, dv in [(128, 128), (256, 256)]
        for deterministic in (True, False)
    ),
]


@each([*FORWARD_CASES, *GRADIENT_CASES])
def test_r1_r3_r4_a_thousand_repeats(case: Case) -> None:
    """R1, R3, R4: also in scratch full of NaN."""
    check_repeats(make_call(case), REPEATS)


@each(
    [
        *(
            Case(d, batch=4, seqlen_q=1024, seqlen_k=1024, heads_q=8, heads_kv=2, **CAUSAL.options)
            for d in (64, 128, 256)
        ),
        *(
            GradientCase(
                d,
                dv,
                batch=4,
                seqlen_q=1024,
                seqlen_k=1024,
                heads_q=8,
                deterministic=deterministic,
                **CAUSAL.options,
            )
            for d, dv in GRADIENT_TILES
            for deterministic in (True, False)
        ),
    ]
)
def test_r4_repeats_beside_other_traffic(case: Case) -> None:
    """R4: little memory is left, and another stream keeps memory and multiprocessors busy."""
    call, neighbour = make_call(case), make_call(case.replace(batch=3, seqlen_k=600, seed=1))
    with other_traffic(neighbour) as more:
        check_repeats(call, 300, before_each=more)


@each(
    GradientCase(d, dv, seqlen_q=500, seqlen_k=700, deterministic=deterministic, **CAUSAL.options)
    for d, dv in GRADIENT_TILES
    for deterministic in (True, False)
)
def test_r1_r2_repeats_without_memory_caching(case: Case) -> None:
    """R1, R2: scratch is given back as soon as the host is done with it, and comes from elsewhere each time."""
    call = make_call(case)
    with no_memory_caching():
        check_repeats(call, 100)


@each(
    GradientCase(
        256,
        seqlen_q=8192,
        seqlen_k=8192,
        heads_q=16,
        heads_kv=4,
        deterministic=deterministic,
        **mask.options,
    )
    for deterministic, mask in [(False, FULL), (True, CAUSAL)]
)
def test_r9_long_sequences_by_clusters(case: GradientCase, gigabytes) -> None:
    """R9: heads that share keys, 100 times, where two CTAs work together as a cluster."""
    gigabytes(60)
    assert case.kernel_configs()[-1].cluster_size == 2
    call = make_call(case)
    part, of = _last_group(call)
    check_repeats(call, 100, check=lambda results: part.check(of(results)))


def _last_group(call: Call) -> tuple[Call, Callable[[Results], Results]]:
    """The call of the last sequence's last key head alone, and its part of the whole call's results.

    The reference has no room for more.
    """
    case, tensors = call.case, call.tensors
    group = case.heads_q // case.heads_kv
    of_queries, of_keys = ((slice(-1, None), slice(None), slice(-heads, None)) for heads in (group, 1))
    part = Call(
        case.replace(batch=1, heads_q=group, heads_kv=1),
        Tensors(tensors.q[of_queries], tensors.k[of_keys], tensors.v[of_keys]),
        Incoming(call.incoming.dout[of_queries]),
    )
    return part, lambda results: (results[0][of_queries], results[1][of_keys], results[2][of_keys])


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
    margin = sm_margin(case, tensors)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_interface.flash_attn_func(q, k, v, causal=True, sm_margin=margin) * 2

    out, _ = run(case, tensors)
    assert torch.equal(compiled(tensors.q, tensors.k, tensors.v), out * 2)
