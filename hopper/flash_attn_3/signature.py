"""A forward call without its data: everything that decides whether it is valid and what is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .arguments import plain_float, plain_int, window_sides


class TensorSpec(NamedTuple):
    """What is known of a tensor before the launch. Strides are free, so they are not part of it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class ForwardSignature(NamedTuple):
    """One forward call. Hashable: equal signatures are equally valid and launch the same.

    A field that should be a tensor and is something else holds that thing's type, for the error's text.
    """

    q: TensorSpec  # (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q
    k: TensorSpec  # (b, sk, hk, d), or (total_k, hk, d) with cu_seqlens_k
    v: TensorSpec  # (b, sk, hk, dv), or (total_k, hk, dv) with cu_seqlens_k
    out: TensorSpec | None
    cu_seqlens_q: TensorSpec | None
    cu_seqlens_k: TensorSpec | None
    seqused_q: TensorSpec | None
    seqused_k: TensorSpec | None
    q_descale: TensorSpec | None
    k_descale: TensorSpec | None
    v_descale: TensorSpec | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    attention_chunk: int
    softcap: float
    num_splits: int
    sm_margin: int

    @property
    def tensors(self) -> dict[str, TensorSpec | None]:
        """The leading fields, which stand for tensors, by name."""
        return dict(zip(self._fields[:NUM_TENSORS], self, strict=False))

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def seqlen_q(self) -> int:
        """Rows of the longest query sequence."""
        return self.q.shape[1] if self.cu_seqlens_q is None else self.max_seqlen_q

    @property
    def seqlen_k(self) -> int:
        """Rows of the longest key sequence."""
        return self.k.shape[1] if self.cu_seqlens_k is None else self.max_seqlen_k

    @property
    def is_varlen(self) -> bool:
        """Whether lengths are read from device memory."""
        index_tensors = (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k)
        return any(spec is not None for spec in index_tensors)

    @property
    def scale(self) -> float:
        """The softmax scale, by default 1 / sqrt(head_dim)."""
        return self.q.shape[-1] ** -0.5 if self.softmax_scale is None else float(self.softmax_scale)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(b, h, sq), or (h, total_q) with cu_seqlens_q."""
        *rows, heads, _ = self.q.shape
        return (rows[0], heads, rows[1]) if self.cu_seqlens_q is None else (heads, rows[0])


NUM_TENSORS = ForwardSignature._fields.index("v_descale") + 1


def forward_signature(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    sm_margin: int = 0,
) -> ForwardSignature:
    """The signature of a call. On the path of every call: tests of type spare what is plain already."""
    if window_size.__class__ is not tuple or window_size != (-1, -1):
        window_size = window_sides(window_size)
    if softmax_scale is not None and softmax_scale.__class__ is not float:
        softmax_scale = plain_float("softmax_scale", softmax_scale)
    if max_seqlen_q is not None and max_seqlen_q.__class__ is not int:
        max_seqlen_q = plain_int("max_seqlen_q", max_seqlen_q)
    if max_seqlen_k is not None and max_seqlen_k.__class__ is not int:
        max_seqlen_k = plain_int("max_seqlen_k", max_seqlen_k)
    return ForwardSignature(
        _spec(q),
        _spec(k),
        _spec(v),
        _spec(out),
        _spec(cu_seqlens_q),
        _spec(cu_seqlens_k),
        _spec(seqused_q),
        _spec(seqused_k),
        _spec(q_descale),
        _spec(k_descale),
        _spec(v_descale),
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        bool(causal),
        *window_size,
        attention_chunk,
        softcap,
        num_splits,
        sm_margin,
    )


def _spec(tensor: torch.Tensor | None) -> TensorSpec | type | None:
    if tensor is None:
        return None
    try:
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device)
    except AttributeError:
        return type(tensor)
