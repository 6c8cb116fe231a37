"""Gradients over dtypes, head dims, masks, softcap, head groups, lengths and strides."""

from __future__ import annotations

import pytest
import torch

import flash_attn_interface
from flash_attn_3 import launch
from flash_attn_3.backward_config import BACKWARD_HEAD_DIM_TILES

from .cases import CAUSAL, FULL, KERNEL_MASKS, MASKS, GradientCase, each
from .gradients import (
    check_case,
    check_gradients,
    differentiate,
    differentiate_by_operator,
    make_incoming,
)
from .harness import make_tensors, poisoned_allocations, sm_margin
from .layouts import padded_rows, stored_as

#: (head_dim, head_dim_v) of whole tiles: every way in which warpgroups share them.
TILES = [(64, 64), (128, 128), (64, 128), (192, 128), (192, 192), (256, 256), (64, 256)]
#: Widths that fill a tile only in part (L4).
PARTS = [(8, 8), (40, 40), (72, 72), (96, 96), (24, 72), (64, 16), (8, 128), (136, 104), (160, 160), (232, 232)]
HEAD_DIMS = [*TILES, *PARTS]
DTYPES = (torch.bfloat16, torch.float16)


@each(
    GradientCase(d, dv, dtype=dtype, seqlen_q=200, seqlen_k=333, **mask.options)
    for d, dv in HEAD_DIMS
    for dtype in DTYPES
    for mask in MASKS
)
def test_every_kernel(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, dv, seqlen_q=333, seqlen_k=200, softcap=softcap, **mask.options)
    for d, dv in TILES
    for softcap in (3.0, 30.0)
    for mask in KERNEL_MASKS
)
def test_softcap(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, heads_q=heads_q, heads_kv=heads_kv, seqlen_q=190, seqlen_k=150, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for heads_q, heads_kv in [(1, 1), (6, 6), (6, 2), (5, 1), (16, 2)]
    for mask in KERNEL_MASKS
)
def test_head_groups(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, dv, **sizes, **mask.options, deterministic=deterministic, all_sms=True)
    for d, dv in ((64, 64), (40, 72), (128, 128), (192, 128), (192, 192), (256, 256))
    for mask in KERNEL_MASKS
    for deterministic in (False, True)
    for sizes in (
        {"batch": 1, "heads_q": 8, "heads_kv": 1, "seqlen_q": 150, "seqlen_k": 300},
        {"lens_q": (100, 0, 130), "lens_k": (140, 70, 0), "heads_q": 6, "heads_kv": 2, "spare_k": 3},
    )
)
def test_few_keys_that_many_heads_share(case: GradientCase) -> None:
    """Parts of these heads have tiles of their own, whose dk and dv are added up in the same order always."""
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, batch=1, heads_q=2, heads_kv=1, seqlen_q=sq, seqlen_k=sk, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for sq, sk in [(1, 2), (1, 300), (300, 2), (63, 65), (64, 128), (65, 127), (129, 257), (127, 129), (1000, 77)]
    for mask in KERNEL_MASKS
)
def test_odd_lengths(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, seqlen_q=70, seqlen_k=1, **mask.options) for d in BACKWARD_HEAD_DIM_TILES for mask in (FULL, CAUSAL)
)
def test_a_single_key(case: GradientCase) -> None:
    """Its weight is 1 whatever its score: dq and dk are zero but for rounding in fp32, which the rule leaves out."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    dq, dk, dv = differentiate(case, tensors, incoming)
    assert dq.abs().max() <= 1e-4 and dk.abs().max() <= 1e-3
    of_heads = incoming.dout.double().unflatten(2, (case.heads_kv, -1))
    expected = of_heads[:, -1:].sum(3) if case.causal else of_heads.sum((1, 3))[:, None]
    torch.testing.assert_close(dv.double(), expected, rtol=0.02, atol=0.02)


@each(
    GradientCase(d, seqlen_q=1500, seqlen_k=2100, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
)
def test_many_blocks(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, lens_q=(100, 0, 257, 1), lens_k=(150, 70, 0, 300), **mask.options)
    for d in (72, *BACKWARD_HEAD_DIM_TILES)
    for mask in MASKS
)
def test_packed_sequences(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@pytest.mark.parametrize("lens", [{"lens_q": (100, 200)}, {"lens_k": (100, 200)}, {}], ids=["q", "k", "dense"])
@each(
    GradientCase(d, batch=2, seqlen_q=200, seqlen_k=200, used_q=(99, 130), used_k=(77, 0), **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in KERNEL_MASKS
)
def test_mixtures_of_dense_and_packed_sides(case: GradientCase, lens: dict[str, tuple[int, ...]]) -> None:
    case = case.replace(**lens)
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, seqlen_q=200, seqlen_k=333, softcap=softcap, with_dlse=True, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for softcap in (0.0, 10.0)
    for mask in MASKS
)
def test_gradient_of_the_log_sum_exp(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


@each(
    GradientCase(d, lens_q=(100, 257), lens_k=(150, 30), causal=True, with_dlse=True) for d in BACKWARD_HEAD_DIM_TILES
)
def test_gradient_of_the_log_sum_exp_of_packed_sequences(case: GradientCase) -> None:
    check_case(case, make_tensors(case))


# -- layout ------------------------------------------------------------------------------------------------


@each(
    GradientCase(d, heads_kv=4, seqlen_q=190, seqlen_k=190, **mask.options)
    for d in BACKWARD_HEAD_DIM_TILES
    for mask in MASKS
)
def test_l1_l8_packed_qkv(case: GradientCase) -> None:
    """L1, L8: one gradient for one packed tensor, written in place."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    qkv = torch.stack([tensors.q, tensors.k, tensors.v], dim=2).requires_grad_()
    options = {"causal": case.causal, "window_size": case.window_size, "attention_chunk": case.attention_chunk}
    with poisoned_allocations():
        out = flash_attn_interface.flash_attn_qkvpacked_func(qkv, **options, sm_margin=sm_margin(case, tensors))
        (dqkv,) = torch.autograd.grad(out, qkv, incoming.dout)
    assert dqkv.shape == qkv.shape
    check_gradients(case, tensors, incoming, dqkv.unbind(2))


@each(GradientCase(d, seqlen_q=150, seqlen_k=170, causal=True) for d in (40, *BACKWARD_HEAD_DIM_TILES))
def test_l1_every_tensor_with_its_own_strides(case: GradientCase) -> None:
    """L1: all tensors lie in memory in ways of their own; what surrounds the gradients stays as it is."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    tensors.q = stored_as(tensors.q, 0, 2, 1, 3)
    tensors.k = stored_as(tensors.k, 1, 0, 2, 3)
    tensors.v = stored_as(tensors.v, 2, 0, 1, 3)
    incoming.dout = stored_as(incoming.dout, 1, 2, 0, 3)
    guarded = [_guarded(x) for x in (tensors.q, tensors.k, tensors.v)]
    gradients = tuple(view for _, view in guarded)
    differentiate_by_operator(case, tensors, incoming, gradients, out_layout=padded_rows)
    check_gradients(case, tensors, incoming, gradients)
    for outer, view in guarded:
        view.fill_(float("nan"))
        assert outer.isnan().all()


def _guarded(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN, and a view inside of it with other memory on all sides."""
    b, s, h, d = like.shape
    outer = like.new_full((b + 2, s + 70, h + 2, d + 16), float("nan"))
    return outer, outer[1 : b + 1, 35 : s + 35, 1 : h + 1, 8 : d + 8]


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1,), (2,)], ids=str)
@each(GradientCase(d, seqlen_q=150, seqlen_k=170) for d in BACKWARD_HEAD_DIM_TILES)
def test_l1_expanded_gradient(case: GradientCase, dims: tuple[int, ...]) -> None:
    """L1: dout has strides of 0, as the gradient of a sum does."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    first = [slice(0, 1) if dim in dims else slice(None) for dim in range(4)]
    incoming.dout = incoming.dout[tuple(first)].expand_as(incoming.dout)
    gradients = differentiate(case, tensors, incoming)
    check_gradients(case, tensors, incoming, gradients)


@pytest.mark.parametrize("spare", [1, 4])
@each(
    [
        *(GradientCase(d, seqlen_q=150, seqlen_k=170) for d in BACKWARD_HEAD_DIM_TILES),
        GradientCase(128, lens_q=(150, 0, 31), lens_k=(170, 5, 0)),
    ]
)
def test_l1_gradient_that_tma_cannot_read(case: GradientCase, spare: int) -> None:
    """L1: dout is a view into what out was concatenated with, so that heads are no whole 16 bytes apart."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    wide = incoming.dout.new_full((*incoming.dout.shape[:-1], case.dv + spare), float("nan"))
    wide[..., spare:] = incoming.dout
    incoming.dout = wide[..., spare:]
    check_gradients(case, tensors, incoming, differentiate(case, tensors, incoming))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
@each([GradientCase(64, seqlen_q=150, seqlen_k=170, causal=True)])
def test_unwanted_gradients(case: GradientCase, wanted: str) -> None:
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    leaves = {name: getattr(tensors, name).clone().requires_grad_(name in wanted) for name in "qkv"}
    with poisoned_allocations():
        out = flash_attn_interface.flash_attn_func(
            *leaves.values(), causal=case.causal, sm_margin=sm_margin(case, tensors)
        )
        out.backward(incoming.dout)
    check_gradients(case, tensors, incoming, tuple(leaf.grad for leaf in leaves.values()))


# -- bitwise equal repeats -----------------------------------------------------------------------------------


@each(
    [
        *(
            GradientCase(d, seqlen_q=1000, seqlen_k=1500, deterministic=True, **mask.options)
            for d in BACKWARD_HEAD_DIM_TILES
            for mask in KERNEL_MASKS
        ),
        GradientCase(64, 128, seqlen_q=500, seqlen_k=700, deterministic=True),
        GradientCase(192, 128, seqlen_q=500, seqlen_k=700, deterministic=True, causal=True),
        GradientCase(128, heads_q=8, heads_kv=1, seqlen_q=500, seqlen_k=700, deterministic=True, causal=True),
        *(
            GradientCase(d, dv, seqlen_q=500, seqlen_k=700, softcap=5.0, deterministic=True)
            for d, dv in [(64, 64), (128, 128), (192, 128), (256, 256)]
        ),
        *(
            GradientCase(
                d, lens_q=(0, 500, 3, 0), lens_k=(100, 700, 0, 0), window_size=(70, 30), deterministic=True, spare_q=130
            )
            for d in (128, 256)
        ),
    ]
)
def test_r1_r3_r4_ordered_additions(case: GradientCase) -> None:
    """R1, R3, R4: right, bitwise equal over repeats in dirty memory, and no deadlock."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    first = differentiate(case, tensors, incoming)
    check_gradients(case, tensors, incoming, first)
    for _ in range(20):
        again = differentiate(case, tensors, incoming)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@each(
    GradientCase(d, batch=4, heads_q=16, heads_kv=16, seqlen_q=4096, seqlen_k=4096, deterministic=True)
    for d in (128, 256)
)
def test_r1_more_tiles_than_fit_on_the_gpu(case: GradientCase) -> None:
    """R1: 2048 tiles wait for each other in turns, and all of them end."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    first = differentiate(case, tensors, incoming)
    assert all(torch.equal(x, y) for x, y in zip(first, differentiate(case, tensors, incoming), strict=True))
    one = slice(0, 1)
    part = type(tensors)(tensors.q[one], tensors.k[one], tensors.v[one])
    incoming.dout = incoming.dout[one]
    check_gradients(case, part, incoming, tuple(x[one] for x in first))


@each(
    GradientCase(d, seqlen_q=300, seqlen_k=900, causal=True, deterministic=True, all_sms=True) for d in (64, 128, 256)
)
@pytest.mark.parametrize("left", [2, pytest.param(16, marks=pytest.mark.hardware)])
def test_sm_margin(case: GradientCase, left: int, launched_ctas: dict[str, list[int]]) -> None:
    """CTAs on the multiprocessors that are left alone, each with many tiles; in order, the same bits."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    gradients = differentiate(case, tensors, incoming)
    margin = launch.device_sms(torch.device("cuda", 0)) - left
    with_margin = differentiate(case, tensors, incoming, sm_margin=margin)
    check_gradients(case, tensors, incoming, with_margin)
    all_ctas, few_ctas = launched_ctas["backward"]
    assert all_ctas >= few_ctas == left
    assert all(torch.equal(x, y) for x, y in zip(gradients, with_margin, strict=True))


# -- sizes -----------------------------------------------------------------------------------------------------


@each([GradientCase(64, batch=batch, heads_q=heads, heads_kv=heads, seqlen_q=5, seqlen_k=7, **FULL.options)
       for batch, heads in [(70_000, 1), (1, 70_000)]])  # fmt: skip
def test_i1_batch_and_heads_beyond_a_grids_limit(case: GradientCase) -> None:
    """I1, I5: more than 65535 sequences, and heads."""
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    gradients = differentiate(case, tensors, incoming)
    ends = [slice(0, 3), slice(65_534, 65_540), slice(69_997, 70_000)]
    for end in ends:
        part = (end, slice(None), slice(None)) if case.batch > 1 else (slice(None), slice(None), end)
        some = type(tensors)(*(getattr(tensors, name)[part] for name in "qkv"))
        check_gradients(case, some, type(incoming)(incoming.dout[part], None), tuple(x[part] for x in gradients))
