"""Gradients as training programs want them: compiled, recomputed, through merges of partial results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_attn_3 import launch
from flash_attn_interface import flash_attn_func

from .cases import CAUSAL, GradientCase, each
from .gradients import Gradients, check_gradients, make_incoming
from .harness import make_tensors, poisoned_allocations

#: Every way in which warpgroups share a tile; enough blocks of keys that the order of additions shows.
TILES = [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)]

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _attention(case: GradientCase) -> Attention:
    """(out, lse) of the case's call."""
    margin = case.sm_margin(launch.device_sms(torch.device("cuda", 0)))
    options = {"causal": case.causal, "deterministic": case.deterministic, "sm_margin": margin}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_attn_func(q, k, v, **options, return_attn_probs=True)

    return attend


def _differentiate(case: GradientCase, attend: Attention) -> Gradients:
    """Of the function's results, by the gradients that the case brings."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    leaves = [x.requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    with poisoned_allocations():
        out, lse = attend(*leaves)
        torch.autograd.backward((out, lse), (incoming.dout.to(out.dtype), incoming.dlse))
    return tuple(leaf.grad for leaf in leaves)


def _check(case: GradientCase, gradients: Gradients) -> None:
    tensors = make_tensors(case)
    check_gradients(case, tensors, make_incoming(case, tensors), gradients)


def _equal(x: Gradients, y: Gradients) -> bool:
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.hardware
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@each(
    GradientCase(d, dv, seqlen_q=500, seqlen_k=1500, with_dlse=True, deterministic=True, **CAUSAL.options)
    for d, dv in TILES
)
def test_g7_deterministic_when_compiled(case: GradientCase, backend: str) -> None:
    """G7: traced whole, the eager bits, every time. (Not in the emulator: the compiler sees through its tensors.)"""
    eager = _differentiate(case, _attention(case))
    _check(case, eager)
    torch._dynamo.reset()
    compiled = torch.compile(_attention(case), fullgraph=True, backend=backend)
    assert all(_equal(eager, _differentiate(case, compiled)) for _ in range(20))


@pytest.mark.hardware
@each(GradientCase(d, dv, seqlen_q=300, seqlen_k=700, with_dlse=True, **CAUSAL.options) for d, dv in TILES)
def test_compiled_gradients(case: GradientCase) -> None:
    torch._dynamo.reset()
    _check(case, _differentiate(case, torch.compile(_attention(case), fullgraph=True, backend="aot_eager")))


@pytest.mark.parametrize("use_reentrant", [False, True])
@each(
    GradientCase(d, dv, seqlen_q=150, seqlen_k=300, with_dlse=True, deterministic=True, **CAUSAL.options)
    for d, dv in TILES
)
def test_activation_checkpointing(case: GradientCase, use_reentrant: bool) -> None:
    """The forward pass runs again in the middle of the backward pass, with the same bits."""
    attend = _attention(case)

    def recomputed(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint(attend, *tensors, use_reentrant=use_reentrant)

    gradients = _differentiate(case, recomputed)
    assert _equal(_differentiate(case, attend), gradients)
    _check(case, gradients)


@each(GradientCase(d, dv, seqlen_q=150, seqlen_k=300, with_dlse=True) for d, dv in TILES)
def test_a_merge_of_partial_results(case: GradientCase) -> None:
    """Two blocks of keys, merged by their log-sum-exps as in ring attention, have the gradients of the whole."""
    attend = _attention(case)

    def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = zip(k.split(case.seqlen_k // 2, 1), v.split(case.seqlen_k // 2, 1), strict=True)
        outs, lses = zip(*(attend(q, *block) for block in blocks), strict=True)
        total = torch.logsumexp(torch.stack(lses), dim=0)
        weights = [torch.exp(lse - total).transpose(1, 2)[..., None] for lse in lses]
        return sum(weight * out for weight, out in zip(weights, outs, strict=True)), total

    _check(case, _differentiate(case, merged))
