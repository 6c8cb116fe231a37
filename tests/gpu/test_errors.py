"""Wrong calls on the GPU: an error that names the argument, nothing launched, and the next call works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .cases import Case
from .harness import Tensors, check, make_tensors, run

pytestmark = pytest.mark.hardware

DENSE = Case(128, heads_q=4, heads_kv=2, seqlen_q=100, seqlen_k=150)
VARLEN = Case(128, heads_q=4, heads_kv=2, lens_q=(60, 40), lens_k=(100, 50))

Change = Callable[[Tensors], dict[str, object] | None]


def _all_of(names: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change each of these tensors; a name is one letter."""

    def apply(tensors: Tensors) -> None:
        for name in names:
            setattr(tensors, name, change(getattr(tensors, name)))

    return apply


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: setattr(tensors, name, change(getattr(tensors, name)))


def _option(**options: object) -> Change:
    return lambda tensors: options


def _head_dim(width: int) -> Change:
    return _all_of("qkv", lambda rows: rows.new_zeros((*rows.shape[:-1], width)))


#: (id, argument that the text names, exception types, change)
DENSE_ERRORS = [
    ("q_float32", "q", (TypeError, ValueError), _set("q", torch.Tensor.float)),
    ("k_other_dtype", "k", (TypeError, ValueError), _set("k", torch.Tensor.half)),
    ("v_on_cpu", "v", (ValueError, RuntimeError), _set("v", torch.Tensor.cpu)),
    ("k_other_batch", "k", ValueError, _all_of("kv", lambda rows: rows[:1])),
    ("v_other_length", "v", ValueError, _set("v", lambda v: v[:, :-1])),
    ("k_other_head_dim", "k", ValueError, _set("k", lambda k: k[..., :64])),
    ("heads_not_a_multiple", "q", ValueError, _set("q", lambda q: q[:, :, :3])),
    ("three_dimensional_q", "q", ValueError, _set("q", lambda q: q[0])),
    ("head_dim_1", "q", ValueError, _head_dim(1)),
    ("head_dim_59", "q", ValueError, _head_dim(59)),
    ("head_dim_111", "q", ValueError, _head_dim(111)),
    ("head_dim_264", "q", ValueError, _head_dim(264)),
    ("head_dim_v_too_wide", "v", ValueError, _set("v", lambda v: v.new_zeros((*v.shape[:-1], 256)))),
    ("negative_scale", "softmax_scale", ValueError, _option(softmax_scale=-1.0)),
    ("scale_nan", "softmax_scale", ValueError, _option(softmax_scale=float("nan"))),
    ("negative_softcap", "softcap", ValueError, _option(softcap=-1.0)),
    ("negative_chunk", "attention_chunk", ValueError, _option(attention_chunk=-1)),
    ("two_splits", "num_splits", NotImplementedError, _option(num_splits=2)),
    (
        "fp8",
        "q",
        NotImplementedError,
        _all_of("qkv", lambda rows: rows.to(torch.float8_e4m3fn)),
    ),
]
VARLEN_ERRORS = [
    ("no_max_seqlen_q", "max_seqlen_q", (ValueError, TypeError), _option(max_seqlen_q=None)),
    ("no_max_seqlen_k", "max_seqlen_k", (ValueError, TypeError), _option(max_seqlen_k=None)),
    ("int64_offsets", "cu_seqlens_q", (TypeError, ValueError), _set("cu_seqlens_q", torch.Tensor.long)),
    ("offsets_on_cpu", "cu_seqlens_k", (ValueError, RuntimeError), _set("cu_seqlens_k", torch.Tensor.cpu)),
    ("other_number_of_offsets", "cu_seqlens_k", ValueError, _set("cu_seqlens_k", lambda x: x[:-1])),
    ("strided_offsets", "cu_seqlens_q", ValueError, _set("cu_seqlens_q", lambda x: x.repeat_interleave(2)[::2])),
    ("two_dimensional_offsets", "cu_seqlens_q", ValueError, _set("cu_seqlens_q", lambda x: x[None])),
    ("four_dimensional_q", "q", ValueError, _set("q", lambda q: q[None])),
]


@pytest.mark.parametrize(
    ("case", "argument", "kinds", "change"),
    [pytest.param(DENSE, *rest, id=f"dense-{name}") for name, *rest in DENSE_ERRORS]
    + [pytest.param(VARLEN, *rest, id=f"varlen-{name}") for name, *rest in VARLEN_ERRORS],
)
def test_error_names_the_argument_and_the_next_call_works(
    case: Case, argument: str, kinds: type[Exception] | tuple[type[Exception], ...], change: Change
) -> None:
    tensors = make_tensors(case)
    options = change(tensors) or {}
    with pytest.raises(kinds, match=rf"\b{argument}\b"):
        run(case, tensors, **options)
    right = make_tensors(case)
    check(case, right, *run(case, right))
