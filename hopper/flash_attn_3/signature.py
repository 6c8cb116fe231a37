"""A call without its data: everything that decides whether it is valid and what is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .arguments import check_is_dense, invalid, plain_bool, plain_float, plain_int, window_sides
from .backward_plan import num_blocks, padded_rows, round_up


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


#: How many of the `OptionalTensors`, the first ones, say where sequences lie; the others are descales.
NUM_INDEX_TENSORS = 4
NO_INDEX_TENSORS = (None,) * NUM_INDEX_TENSORS
NO_EXTRAS = OptionalTensors()
NO_OPTIONS = ForwardOptions()
#: All of dq, dk and dv.
ALL_WANTED = (True, True, True)


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


class BackwardSignature(NamedTuple):
    """One backward call: the forward call whose results it has, gradients of these, and gradients to write."""

    forward: ForwardSignature  # with out
    softmax_lse: TensorSpec  # `ForwardSignature.lse_shape`
    dout: TensorSpec  # like out
    dlse: TensorSpec | None  # like softmax_lse; None: zero
    dq: TensorSpec | None  # like q; None: not wanted, or to be allocated
    dk: TensorSpec | None
    dv: TensorSpec | None
    deterministic: bool

    @property
    def tensors(self) -> dict[str, TensorSpec | None]:
        """The fields that the forward call does not have and that stand for tensors, by name."""
        return dict(zip(self._fields[1:-1], self[1:-1], strict=True))

    def statistics_shape(self, block_m: int) -> tuple[int, ...]:
        """Shape of scratch with two floats per query row: (2, b, h, rows), or (2, h, rows) with cu_seqlens_q."""
        *rows, heads, _ = self.forward.q.shape
        if self.forward.cu_seqlens_q is None:
            return 2, rows[0], heads, round_up(rows[1], block_m)
        return 2, heads, padded_rows(rows[0], self.forward.batch, block_m)

    def num_key_blocks(self, block_n: int) -> int:
        """Blocks of keys of all key heads and sequences."""
        *_, rows, heads, _ = self.forward.k.shape
        return heads * num_blocks(rows, self.forward.batch, block_n, packed=self.forward.cu_seqlens_k is not None)


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
    tensors = zip(TENSOR_NAMES, (q, k, v, out, *extras), strict=True)
    specs = (_spec(name, tensor, is_optional=name not in ("q", "k", "v")) for name, tensor in tensors)
    return ForwardSignature(*specs, *options)


def backward_signature(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    index_tensors: tuple[torch.Tensor | None, ...] = NO_INDEX_TENSORS,
    options: ForwardOptions = NO_OPTIONS,
    deterministic: bool = False,
    gradients: tuple[torch.Tensor | None, ...] | None = None,
) -> BackwardSignature:
    """The signature of a backward call with plain options.

    Raises:
        TypeError: what should be a tensor is none.
    """
    _spec("out", out)
    dq, dk, dv = gradients or (None, None, None)
    return BackwardSignature(
        forward_signature(q, k, v, OptionalTensors(*index_tensors), options, out),
        _spec("softmax_lse", softmax_lse),
        _spec("dout", dout),
        _spec("dlse", dlse, is_optional=True),
        _spec("dq", dq, is_optional=True),
        _spec("dk", dk, is_optional=True),
        _spec("dv", dv, is_optional=True),
        deterministic,
    )


def _spec(name: str, tensor: torch.Tensor | None, is_optional: bool = False) -> TensorSpec | None:
    if isinstance(tensor, torch.Tensor):
        check_is_dense(name, tensor)
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device)
    if tensor is None and is_optional:
        return None
    raise invalid(TypeError, name, None if tensor is None else f"a {type(tensor).__name__}", "a torch.Tensor")


def plain_options(options: ForwardOptions) -> ForwardOptions:
    """The same options, those that come in several guises in their plain one.

    On the path of every call: tests of type spare what is plain already.
    """
    max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, chunk, softcap, splits, pack_gqa, margin = options
    if (
        window_size.__class__ is tuple
        and (window_size == (-1, -1) or tuple(map(type, window_size)) == (int, int))
        and causal.__class__ is bool
        and (softmax_scale is None or softmax_scale.__class__ is float)
        and softcap.__class__ is float
        and (pack_gqa is None or pack_gqa.__class__ is bool)
        and (max_seqlen_q is None or max_seqlen_q.__class__ is int)
        and (max_seqlen_k is None or max_seqlen_k.__class__ is int)
    ):
        return options
    return ForwardOptions(
        None if max_seqlen_q is None else plain_int("max_seqlen_q", max_seqlen_q),
        None if max_seqlen_k is None else plain_int("max_seqlen_k", max_seqlen_k),
        None if softmax_scale is None else plain_float("softmax_scale", softmax_scale),
        plain_bool("causal", causal),
        window_sides(window_size),
        chunk,
        plain_float("softcap", softcap),
        splits,
        None if pack_gqa is None else plain_bool("pack_gqa", pack_gqa, "True, False or None"),
        margin,
    )
