"""Gradients of tensors in which 32-bit offsets overflow (I1, I3)."""

from __future__ import annotations

import pytest
import torch

from .cases import GradientCase, each
from .gradients import Incoming, check_gradients, differentiate, differentiate_by_operator, make_incoming
from .harness import Tensors, make_tensors
from .test_sizes import TWO_GIGA

pytestmark = pytest.mark.hardware


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


@pytest.mark.parametrize("rows_past_the_limit", [-1, 200])
@each(
    [
        GradientCase(128, batch=1, heads_q=16, heads_kv=1, seqlen_q=TWO_GIGA // (16 * 128), seqlen_k=64),
        GradientCase(
            256, batch=1, heads_q=16, heads_kv=1, seqlen_q=TWO_GIGA // (16 * 256), seqlen_k=64, deterministic=True
        ),
    ]
)
def test_i1_i3_queries_of_two_giga_elements(case: GradientCase, rows_past_the_limit: int, gigabytes) -> None:
    """I1, I3: q, out, dout, dq and its sums in fp32; all that comes in comes in at the last rows."""
    gigabytes(50)
    case = case.replace(seqlen_q=case.seqlen_q + rows_past_the_limit)
    last = case.replace(seqlen_q=1000)
    keys = make_tensors(last)
    tensors = Tensors(_random((1, case.seqlen_q, case.heads_q, case.head_dim), case.dtype), keys.k, keys.v)
    dout = torch.zeros_like(tensors.q)
    tail = slice(-last.seqlen_q, None)
    dout[:, tail].normal_()
    dq, dk, dv = differentiate(case, tensors, Incoming(dout))
    part = Tensors(tensors.q[:, tail], keys.k, keys.v)
    check_gradients(last, part, Incoming(dout[:, tail]), (dq[:, tail], dk, dv))
    assert not dq[:, : -last.seqlen_q].any()


@pytest.mark.parametrize("rows_past_the_limit", [-1, 200])
@each(
    GradientCase(
        d,
        batch=1,
        heads_q=16,
        heads_kv=16,
        seqlen_q=64,
        seqlen_k=TWO_GIGA // (16 * d),
        window_size=(500, 0),
        deterministic=deterministic,
    )
    for d, deterministic in [(128, False), (256, True)]
)
def test_i3_keys_of_two_giga_elements(case: GradientCase, rows_past_the_limit: int, gigabytes) -> None:
    """I3: k, v, dk and dv; the window shows the queries the last keys alone, and the others have gradient 0."""
    gigabytes(50)
    case = case.replace(seqlen_k=case.seqlen_k + rows_past_the_limit)
    last = case.replace(seqlen_k=600)
    queries = make_tensors(last)
    shape = (1, case.seqlen_k, case.heads_kv, case.head_dim)
    tensors = Tensors(queries.q, _random(shape, case.dtype), _random(shape, case.dtype))
    incoming = make_incoming(last, queries)
    dq, dk, dv = differentiate(case, tensors, incoming)
    tail = slice(-last.seqlen_k, None)
    part = Tensors(queries.q, tensors.k[:, tail], tensors.v[:, tail])
    check_gradients(last, part, incoming, (dq, dk[:, tail], dv[:, tail]))
    assert not dk[:, : -last.seqlen_k].any() and not dv[:, : -last.seqlen_k].any()


@each(
    GradientCase(d, heads_q=2, heads_kv=2, deterministic=deterministic, **lengths)
    for d, deterministic in [(64, False), (128, True), (192, False), (256, True)]
    for lengths in [{"seqlen_q": 100, "seqlen_k": 130}, {"seqlen_q": 2, "seqlen_k": 2}]
)
def test_i3_strides_of_two_giga_elements(case: GradientCase, gigabytes) -> None:
    """I3: the second sequence, head or row of every tensor lies 2**31 + 64 elements behind the first."""
    gigabytes(24)
    for dim in (0, 1, 2) if case.seqlen_q == 2 else (0, 2):
        _check_far_apart(case, dim)


def _check_far_apart(case: GradientCase, dim: int) -> None:
    tensors = make_tensors(case)
    incoming = make_incoming(case, tensors)
    given, written = (torch.empty(TWO_GIGA + 2**23, dtype=case.dtype, device="cuda") for _ in range(2))

    def far_apart(x: torch.Tensor, storage: torch.Tensor, number: int) -> torch.Tensor:
        strides = list(x.stride())
        strides[dim] = TWO_GIGA + 64
        view = storage.as_strided(x.shape, strides, storage_offset=number * 2**20)
        view.copy_(x)
        return view

    far = Tensors(*(far_apart(getattr(tensors, name), given, i) for i, name in enumerate(("q", "k", "v"))))
    dout = Incoming(far_apart(incoming.dout, given, 3))
    empty = (torch.full_like(x, float("nan")) for x in (tensors.q, tensors.k, tensors.v))
    gradients = tuple(far_apart(x, written, i) for i, x in enumerate(empty))
    differentiate_by_operator(case, far, dout, gradients, out_layout=lambda out: far_apart(out, given, 4))
    check_gradients(case, tensors, incoming, gradients)
