"""The backward operators of `torch.ops.flash_attn_3`.

``bwd`` and ``_flash_attn_backward`` write into the gradients that they are given; programs that merge partial results
themselves call them. ``_attention_gradients`` is functional and is what autograd calls where operators are watched: it
takes what the other two lack, a gradient of the log-sum-exp and a chunk, and computes wanted gradients only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import dispatch, validation
from .arguments import window_sides
from .backward_plan import backward_tile
from .backward_validation import check_backward_tensors
from .config import Score
from .operators import LIBRARY, Arguments, no_accumulators
from .signature import (
    NUM_INDEX_TENSORS,
    BackwardSignature,
    ForwardOptions,
    OptionalTensors,
    backward_signature,
    plain_options,
)

NO_SECOND_BACKWARD = (
    "the gradients of flash_attn_3 cannot be differentiated again: there is no second derivative. "
    "Where create_graph=True is not needed, leave it out"
)

# Five results, all of them scratch, as FlashAttention-3's operator has them today. A test of its own still asks for an
# older schema of eight, with dq, dk and dv in front. Only one of the two can be served. The callers of today read
# softmax_d as the first result (FlashAttention-3), accept both (xFormers) or read none (PyTorch); and a kernel that
# returns arguments that it writes cannot be functionalised.
_BWD_SCHEMA = """bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None,
    Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
    Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,
    float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
    float softcap=0.0, bool deterministic=False, int sm_margin=0
) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""

_FLASH_ATTN_BACKWARD_SCHEMA = """_flash_attn_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? cu_seqlens_q=None,
    Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, Tensor? sequed_k=None, SymInt? max_seqlen_q=None,
    SymInt? max_seqlen_k=None, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None,
    float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
    float softcap=0.0, bool deterministic=False, int sm_margin=0
) -> Tensor"""

_GRADIENTS_SCHEMA = """_attention_gradients(
    Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? cu_seqlens_q,
    Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k,
    float? softmax_scale, bool causal, int window_size_left, int window_size_right, int attention_chunk, float softcap,
    int sm_margin, bool deterministic, bool[3] wanted
) -> (Tensor, Tensor, Tensor)"""

for _schema in (_BWD_SCHEMA, _FLASH_ATTN_BACKWARD_SCHEMA, _GRADIENTS_SCHEMA):
    LIBRARY.define(_schema)


_OPERATORS = torch.ops.flash_attn_3
#: Arguments that have another name elsewhere.
_OTHER_NAMES = {"is_causal": "causal", "sequed_q": "seqused_q", "sequed_k": "seqused_k"}


class _BackwardArguments(Arguments):
    """The arguments of one of the operators."""

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, by the same names for all operators."""
        names = (_OTHER_NAMES.get(name, name) for name in self.names)
        return dict(zip(names, self.values(args, kwargs), strict=True))


_BWD_ARGUMENTS = _BackwardArguments(_OPERATORS.bwd.default)
_FLASH_ATTN_BACKWARD_ARGUMENTS = _BackwardArguments(_OPERATORS._flash_attn_backward.default)
_GRADIENTS_ARGUMENTS = _BackwardArguments(_OPERATORS._attention_gradients.default)


def _for_dispatch(call: dict[str, Any]) -> tuple:
    """The arguments of `dispatch.backward`, up to ``deterministic``."""
    tensors = [call[name] for name in ("q", "k", "v", "out", "softmax_lse")]
    index_tensors = tuple(call[name] for name in OptionalTensors._fields[:NUM_INDEX_TENSORS])
    options = ForwardOptions(
        call["max_seqlen_q"],
        call["max_seqlen_k"],
        call["softmax_scale"],
        call["causal"],
        (call["window_size_left"], call["window_size_right"]),
        call.get("attention_chunk", 0),
        call["softcap"],
        sm_margin=call["sm_margin"],
    )
    return call["dout"], call.get("dlse"), *tensors, index_tensors, options, call["deterministic"]


def _gradients_of(call: dict[str, Any]) -> dispatch.Gradients:
    return call["dq"], call["dk"], call["dv"]


def _fake_signature(call: dict[str, Any], gradients: dispatch.Gradients | None = None) -> BackwardSignature:
    *arguments, options, deterministic = _for_dispatch(call)
    signature = backward_signature(*arguments, plain_options(options), deterministic, gradients)
    check_backward_tensors(signature)
    return signature


def _new_statistic(signature: BackwardSignature, q: torch.Tensor) -> torch.Tensor:
    score = Score.SOFTCAP if signature.forward.softcap > 0 else Score.SCALED
    block_m = backward_tile(q.shape[-1], signature.forward.v.shape[-1], score).block_m
    return q.new_empty(signature.statistics_shape(block_m)[1:], dtype=torch.float32)


# -- the operators that write ----------------------------------------------------------------------------------------


def _bwd(*args, **kwargs):
    """(softmax_d, lse_log2, dq_accum, dk_accum, dv_accum): scratch, of which the last three are always empty."""
    call = _BWD_ARGUMENTS.bind(args, kwargs)
    names = ("dout", "q", "k", "v", "out", "dq", "dk", "dv")
    validation.check_last_strides(**{name: call[name] for name in names})
    _, (softmax_d, lse_log2) = dispatch.backward(*_for_dispatch(call), gradients=_gradients_of(call))
    # Results of an operator may not share memory.
    return softmax_d, lse_log2.clone(), *no_accumulators(call["q"], 3)


def _bwd_fake(*args, **kwargs):
    call = _BWD_ARGUMENTS.bind(args, kwargs)
    signature = _fake_signature(call, _gradients_of(call))
    return *(_new_statistic(signature, call["q"]) for _ in range(2)), *no_accumulators(call["q"], 3)


@contextlib.contextmanager
def _names_of_flash_attn_backward() -> Iterator[None]:
    """Errors name arguments as this operator's callers know them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not str(error).startswith("seqused_"):
            raise
        raise type(error)(str(error).replace("seqused_", "sequed_", 1)) from error


@_names_of_flash_attn_backward()
def _flash_attn_backward_kernel(*args, **kwargs):
    """softmax_d; inputs whose rows are not contiguous are copied."""
    call = _FLASH_ATTN_BACKWARD_ARGUMENTS.bind(args, kwargs)
    gradients = _gradients_of(call)
    validation.check_last_strides(**dict(zip(("dq", "dk", "dv"), gradients, strict=True)))
    _, (softmax_d, _) = dispatch.backward(*_for_dispatch(call), gradients=gradients)
    return softmax_d


@_names_of_flash_attn_backward()
def _flash_attn_backward_fake(*args, **kwargs):
    call = _FLASH_ATTN_BACKWARD_ARGUMENTS.bind(args, kwargs)
    return _new_statistic(_fake_signature(call, _gradients_of(call)), call["q"])


# -- the functional operator -----------------------------------------------------------------------------------------


def call_gradients(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    index_tensors: tuple[torch.Tensor | None, ...],
    options: ForwardOptions,
    deterministic: bool,
    wanted: tuple[bool, bool, bool],
) -> dispatch.Gradients:
    """``_attention_gradients`` of the arguments of `dispatch.backward`; also where dout is None for zero."""
    if dout is None:
        dout = torch.zeros_like(out)
    max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, chunk, softcap, _, _, sm_margin = options
    gradients = _OPERATORS._attention_gradients(
        *(dout, dlse, q, k, v, out, lse, *index_tensors, max_seqlen_q, max_seqlen_k, softmax_scale, bool(causal)),
        *(*window_sides(window_size), chunk, softcap, sm_margin, deterministic, wanted),
    )
    return tuple(gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True))


def _attention_gradients(*args, **kwargs):
    """(dq, dk, dv); empty where they are not wanted."""
    call = _GRADIENTS_ARGUMENTS.bind(args, kwargs)
    gradients, _ = dispatch.backward(*_for_dispatch(call), wanted=tuple(call["wanted"]))
    return tuple(call["q"].new_empty(0) if gradient is None else gradient for gradient in gradients)


def _attention_gradients_fake(*args, **kwargs):
    call = _GRADIENTS_ARGUMENTS.bind(args, kwargs)
    _fake_signature(call)
    tensors = zip((call["q"], call["k"], call["v"]), call["wanted"], strict=True)
    return tuple(x.new_empty(x.shape if is_wanted else 0) for x, is_wanted in tensors)


def _no_second_backward(ctx, *gradients):
    raise NotImplementedError(NO_SECOND_BACKWARD)


for _name, _kernel, _fake in (
    ("bwd", _bwd, _bwd_fake),
    ("_flash_attn_backward", _flash_attn_backward_kernel, _flash_attn_backward_fake),
    ("_attention_gradients", _attention_gradients, _attention_gradients_fake),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"flash_attn_3::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("flash_attn_3::_attention_gradients", _no_second_backward, lib=LIBRARY)


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    sequed_q: torch.Tensor | None = None,
    sequed_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> torch.Tensor:
    """The operator that writes into dq, dk and dv, as a function whose parameters programs read: softmax_d.

    The parameters, their order and their spelling are FlashAttention-3's. A gradient that is None is not computed.
    softmax_d is scratch with the sum of dout * out per query row: fp32 (b, h, rows), or (h, rows) with cu_seqlens_q.
    """
    return _OPERATORS._flash_attn_backward.default(
        *(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k),
        *(dq, dk, dv, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic, sm_margin),
    )
