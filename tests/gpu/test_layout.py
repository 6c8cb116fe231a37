"""Where tensors lie in memory: strides, packed views, alignment, guard zones around the output (L1, L2, L4)."""

from __future__ import annotations

import re

import pytest
import torch

import flash_attn_interface

from .cases import CAUSAL, FULL, KERNEL_MASKS, Case, each
from .harness import Tensors, check, make_tensors, poisoned_allocations, run, run_operator, sm_margin
from .layouts import padded_rows, stored_as

GUARDED_HEAD_DIMS = [(40, 40), (64, 64), (96, 96), (128, 128), (248, 248), (256, 256), (64, 512)]
LAYOUTS = {
    "transposed": lambda rows: stored_as(rows, 0, 2, 1, 3),
    "sequence_first": lambda rows: stored_as(rows, 1, 0, 2, 3),
    "padded_rows": padded_rows,
}


@pytest.mark.parametrize("q_layout", LAYOUTS)
@pytest.mark.parametrize("k_layout", LAYOUTS)
@each(Case(d, seqlen_q=150, seqlen_k=150, causal=True) for d in (64, 128, 256))
def test_l1_each_tensor_with_its_own_strides(case: Case, q_layout: str, k_layout: str) -> None:
    tensors = make_tensors(case)
    tensors.q = LAYOUTS[q_layout](tensors.q)
    tensors.k = LAYOUTS[k_layout](tensors.k)
    tensors.v = LAYOUTS["transposed"](tensors.v) if k_layout != "transposed" else tensors.v
    check(case, tensors, *run(case, tensors))


@each(Case(d, heads_kv=4, seqlen_q=190, seqlen_k=190, **mask.options) for d in (64, 128, 256) for mask in KERNEL_MASKS)
def test_l1_packed_qkv(case: Case) -> None:
    """L1: one (b, s, 3, h, d) tensor, as three views and through the packed function."""
    plain = make_tensors(case)
    qkv = torch.stack([plain.q, plain.k, plain.v], dim=2)
    views = Tensors(*qkv.unbind(2))
    check(case, views, *run(case, views))
    options = {"causal": case.causal, "window_size": case.window_size, "sm_margin": sm_margin(case, plain)}
    with poisoned_allocations():
        result = flash_attn_interface.flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)
    check(case, plain, *result)


@each(Case(d, heads_q=6, heads_kv=2, seqlen_q=190, seqlen_k=190) for d in (64, 128))
def test_l1_packed_heads(case: Case) -> None:
    """L1: one (b, s, hq + 2 hk, d) tensor through the packed function."""
    plain = make_tensors(case)
    qkv = torch.cat([plain.q, plain.k, plain.v], dim=2)
    options = {"num_heads_q": case.heads_q, "sm_margin": sm_margin(case, plain)}
    with poisoned_allocations():
        result = flash_attn_interface.flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)
    check(case, plain, *result)


@each(Case(d, heads_q=8, heads_kv=2, lens_q=(90, 0, 200), lens_k=(90, 0, 200), causal=True) for d in (64, 128))
def test_l1_packed_varlen_views(case: Case) -> None:
    tensors = make_tensors(case)
    packed = torch.cat([tensors.q, tensors.k, tensors.v], dim=1)
    tensors.q, tensors.k, tensors.v = packed.split([8, 2, 2], dim=1)
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, batch=3, heads_q=4, heads_kv=4, seqlen_q=100, seqlen_k=140, **mask.options)
    for d in (64, 128)
    for mask in (FULL, CAUSAL)
)
@pytest.mark.parametrize("expanded_dim", [0, 1, 2], ids=["batch", "seqlen", "heads"])
def test_l1_expanded_dims(case: Case, expanded_dim: int) -> None:
    """L1: every row, head or sequence is the same memory (a stride of zero)."""
    tensors = make_tensors(case)
    for name in ("q", "k", "v"):
        rows = getattr(tensors, name)
        setattr(tensors, name, rows.narrow(expanded_dim, 0, 1).expand(rows.shape))
    check(case, tensors, *run(case, tensors))


@each(
    Case(128, batch=1, heads_q=1, heads_kv=1, seqlen_q=sq, seqlen_k=sk)
    for sq, sk in [(1, 100), (100, 1), (1, 1), (100, 100)]
)
def test_l1_junk_strides_of_dims_of_size_one(case: Case) -> None:
    tensors = make_tensors(case)
    for name in ("q", "k", "v"):
        rows = getattr(tensors, name)
        strides = [7 if size == 1 else stride for size, stride in zip(rows.shape, rows.stride(), strict=True)]
        setattr(tensors, name, rows.as_strided(rows.shape, strides))
    check(case, tensors, *run(case, tensors))


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@each([Case(128, seqlen_q=130, seqlen_k=130), Case(64, lens_q=(9, 70), lens_k=(9, 70))])
def test_l2_misaligned_pointers(case: Case, name: str, offset: int) -> None:
    """L2: TMA wants 16 bytes: 8 elements are right, less is right or an error that names the tensor."""
    tensors = make_tensors(case)
    rows = getattr(tensors, name)
    storage = torch.empty(rows.numel() + offset, dtype=case.dtype, device="cuda")
    shifted = storage[offset:].view(rows.shape)
    shifted.copy_(rows)
    setattr(tensors, name, shifted)
    _right_or_refused(case, tensors, name, must_work=offset == 8)


@pytest.mark.parametrize("padding", [1, 4, 8])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@each([Case(128, seqlen_q=130, seqlen_k=130)])
def test_l2_misaligned_strides(case: Case, name: str, padding: int) -> None:
    tensors = make_tensors(case)
    rows = getattr(tensors, name)
    wide = torch.zeros(*rows.shape[:-1], rows.shape[-1] + padding, dtype=case.dtype, device="cuda")
    wide[..., : rows.shape[-1]] = rows
    setattr(tensors, name, wide[..., : rows.shape[-1]])
    _right_or_refused(case, tensors, name, must_work=padding == 8)


@each([Case(128, seqlen_q=130, seqlen_k=130)])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_columns_that_are_not_contiguous(case: Case, name: str) -> None:
    """The public function copies such a tensor; the raw operator refuses it by name, and the next call works."""
    tensors = make_tensors(case)
    setattr(tensors, name, getattr(tensors, name).mT.contiguous().mT)
    check(case, tensors, *run(case, tensors))
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        run_operator(case, tensors)
    check(case, tensors, *run(case, tensors))


def _right_or_refused(case: Case, tensors: Tensors, name: str, must_work: bool) -> None:
    try:
        out, lse = run(case, tensors)
    except ValueError as error:
        assert not must_work, "an aligned tensor was refused"
        assert re.search(rf"\b{name}\b", str(error)), error
        aligned = make_tensors(case)
        out, lse = run(case, aligned)  # the next call works
        check(case, aligned, out, lse)
    else:
        check(case, tensors, out, lse)


@each(
    [
        *(
            Case(d, dv, lens_q=(70, 3, 0, 129), lens_k=(64, 100, 5, 0), **mask.options)
            for d, dv in GUARDED_HEAD_DIMS
            for mask in (FULL, CAUSAL)
        ),
        *(Case(d, seqlen_q=130, seqlen_k=77) for d in (40, 64, 128, 256)),
    ]
)
def test_guard_zones_around_the_output(case: Case) -> None:
    """Nothing is written before, between or after the rows of a strided `out`."""
    tensors = make_tensors(case)
    *lead, heads, _ = tensors.q.shape
    outer = torch.full((*lead[:-1], lead[-1] + 256, heads + 2, case.dv + 16), 77.0, dtype=case.dtype, device="cuda")
    inner = outer.narrow(-3, 128, lead[-1]).narrow(-2, 1, heads).narrow(-1, 8, case.dv)
    untouched = torch.ones_like(outer, dtype=torch.bool)
    untouched.narrow(-3, 128, lead[-1]).narrow(-2, 1, heads).narrow(-1, 8, case.dv).fill_(False)
    inner.fill_(float("nan"))
    out, lse = run_operator(case, tensors, out=inner)
    assert out.data_ptr() == inner.data_ptr()
    check(case, tensors, inner, lse)
    assert (outer[untouched] == 77.0).all()
