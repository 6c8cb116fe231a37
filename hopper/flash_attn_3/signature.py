"""A forward call without its data: everything that decides whether it is valid and what is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .arguments import invalid, plain_float, plain_int, window_sides


class OptionalTensors(NamedTuple):
    """The tensors that a call may have beside q, k and v."""

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None


class ForwardOptions(NamedTuple):
    """What a call may ask, as `flash_attn_func` and `flash_attn_varlen_func` have it."""

    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    softmax_scale: float | None = None
    causal: bool = False
    window_size: Any = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    num_splits: int = 1
    pack_gqa: bool | None = None
    sm_margin: int = 0


NO_EXTRAS = OptionalTensors()
NO_OPTIONS = ForwardOptions()


class TensorSpec(NamedTuple):
    """What is known of a tensor before the launch. Strides are free, so they are not part of it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class ForwardSignature(NamedTuple):
    """One forward call. Equal signatures are equally valid and launch the same."""

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
    window_size: tuple[int, int]
    attention_chunk: int
    softcap: float
    num_splits: int
    pack_gqa: bool | None
    sm_margin: int

    @property
    def tensors(self) -> dict[str, TensorSpec | None]:
        """The leading fields, which stand for tensors, by name."""
        return dict(zip(TENSOR_NAMES, self, strict=False))

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


#: The tensors of a call, in the order of its signature.
TENSOR_NAMES = ("q", "k", "v", "out", *OptionalTensors._fields)


def forward_signature(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: OptionalTensors = NO_EXTRAS,
    options: ForwardOptions = NO_OPTIONS,
    out: torch.Tensor | None = None,
) -> ForwardSignature:
    """The signature of a call with plain options.

    Raises:
        TypeError: what should be a tensor is none.
    """
    specs = []
    for name, tensor in zip(TENSOR_NAMES, (q, k, v, out, *extras), strict=True):
        if isinstance(tensor, torch.Tensor):
            specs.append(TensorSpec(tensor.shape, tensor.dtype, tensor.device))
        elif tensor is None and name not in ("q", "k", "v"):
            specs.append(None)
        else:
            raise invalid(TypeError, name, None if tensor is None else f"a {type(tensor).__name__}", "a torch.Tensor")
    return ForwardSignature(*specs, *options)


def plain_options(options: ForwardOptions) -> ForwardOptions:
    """The same options, those that come in several guises in their plain one.

    On the path of every call: tests of type spare what is plain already.
    """
    max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, *others = options
    if (
        window_size.__class__ is tuple
        and (window_size == (-1, -1) or tuple(map(type, window_size)) == (int, int))
        and causal.__class__ is bool
        and (softmax_scale is None or softmax_scale.__class__ is float)
        and (max_seqlen_q is None or max_seqlen_q.__class__ is int)
        and (max_seqlen_k is None or max_seqlen_k.__class__ is int)
    ):
        return options
    return ForwardOptions(
        None if max_seqlen_q is None else plain_int("max_seqlen_q", max_seqlen_q),
        None if max_seqlen_k is None else plain_int("max_seqlen_k", max_seqlen_k),
        None if softmax_scale is None else plain_float("softmax_scale", softmax_scale),
        bool(causal),
        window_sides(window_size),
        *others,
    )
