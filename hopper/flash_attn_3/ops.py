"""The forward operators of `torch.ops.flash_attn_3`, for torch.compile, torch.export and callers of the raw operators.

``_flash_attn_forward`` is functional: it has a kernel, a fake and an autograd formula. ``fwd`` takes an ``out``
that it may write and return, which functionalisation refuses in an operator with a kernel of its own; so ``fwd``
is composite, and what a graph records is the functional operator (and a copy into ``out``).

The backward operators are in `backward_ops`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from . import dispatch, validation
from .arguments import invalid, plain_int, reject_unavailable, window_sides
from .backward_ops import call_gradients
from .operators import LIBRARY, Arguments, no_accumulators
from .signature import NUM_INDEX_TENSORS, ForwardOptions, OptionalTensors, forward_signature, plain_options

_FWD_SCHEMA = """fwd(
    Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None,
    Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,
    Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,
    Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,
    Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,
    Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,
    int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False,
    Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0
) -> (Tensor(out!), Tensor, Tensor, Tensor)"""

_FUNCTIONAL_SCHEMA = """_flash_attn_forward(
    Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None,
    Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None,
    Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,
    Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,
    Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,
    Tensor? v_descale=None, float? softmax_scale=None, bool causal=False, int window_size_left=-1,
    int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True,
    Tensor? scheduler_metadata=None, int num_splits=1, bool? pack_gqa=None, int sm_margin=0, bool deterministic=False
) -> (Tensor, Tensor, Tensor, Tensor)"""

LIBRARY.define(_FWD_SCHEMA)
LIBRARY.define(_FUNCTIONAL_SCHEMA)

_FWD = torch.ops.flash_attn_3.fwd.default
_FUNCTIONAL = torch.ops.flash_attn_3._flash_attn_forward.default
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def call_functional(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: OptionalTensors,
    options: ForwardOptions,
    deterministic: bool = False,
) -> tuple[torch.Tensor, ...]:
    """``_flash_attn_forward`` of the arguments of `dispatch.forward`; ``deterministic`` is for its gradients."""
    by_name = dict(zip(ForwardOptions._fields, options, strict=True))
    # First, for Dynamo cannot compare a pair of tensors, which it makes of numpy's numbers.
    by_name["window_size"] = window_sides(by_name["window_size"])
    by_name = dict(zip(by_name, plain_options(tuple(by_name.values())), strict=True))
    for name in ("attention_chunk", "num_splits", "sm_margin"):
        by_name[name] = plain_int(name, by_name[name])
    by_name["window_size_left"], by_name["window_size_right"] = by_name.pop("window_size")
    by_name |= zip(OptionalTensors._fields, extras, strict=True)
    return _FUNCTIONAL(q, k, v, **by_name, deterministic=deterministic)


def operators_are_watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether somebody must see an operator: a compiler, a tensor subclass (fake, functional, ...), a dispatch mode.

    Meta tensors have no data, so that only an operator's fake can serve them. On the path of every call.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if q.__class__ in _PLAIN_TENSORS and k.__class__ in _PLAIN_TENSORS and v.__class__ in _PLAIN_TENSORS:
        return q.is_meta
    return any(isinstance(x, torch.Tensor) and x.__class__ not in _PLAIN_TENSORS for x in (q, k, v))


def gradient_is_wanted(*tensors: torch.Tensor) -> bool:
    """Whether autograd must record a call of these tensors (what is no tensor is judged later)."""
    try:
        return torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in tensors]
    except AttributeError:
        return False


# -- kernels -----------------------------------------------------------------------------------------------


def _positions(*names: str) -> Callable[[tuple], tuple]:
    """Picks the arguments of these names; both forward operators have the same in the same order.

    ``deterministic``, the last one of the functional operator, is the exception: ``fwd`` does not have it.
    """
    arguments = [argument.name for argument in _FUNCTIONAL._schema.arguments]
    return operator.itemgetter(*map(arguments.index, names))


_OUT = _positions("out_")
_DETERMINISTIC = _positions("deterministic")
_EXTRAS = _positions(*OptionalTensors._fields)
_OPTIONS = _positions(
    *("max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size_left", "window_size_right"),
    *ForwardOptions._fields[ForwardOptions._fields.index("window_size") + 1 :],
)
#: Features that are not there yet.
_UNAVAILABLE = _positions(
    *("k_new", "v_new", "qv", "cu_seqlens_k_new", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "scheduler_metadata"),
)


class _ForwardArguments(Arguments):
    """The arguments of one of the two operators."""

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The arguments of `dispatch.forward` in a call of the operator.

        Features that are not there yet raise if they are asked for. Without effect, and left out: the style of a
        rotation.
        """
        values = self.values(args, kwargs)
        if _UNAVAILABLE(values) != _UNAVAILABLE(self.defaults):
            reject_unavailable(**dict(zip(_UNAVAILABLE(self.names), _UNAVAILABLE(values), strict=True)))
        max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, *others = _OPTIONS(values)
        options = (max_seqlen_q, max_seqlen_k, softmax_scale, causal, (window_left, window_right), *others)
        return *values[:3], _EXTRAS(values), options, _OUT(values)


_FWD_ARGUMENTS = _ForwardArguments(_FWD)
_FUNCTIONAL_ARGUMENTS = _ForwardArguments(_FUNCTIONAL)


def _functional_forward(*args, **kwargs):
    """(out, lse, out_accum, lse_accum); the accumulators are empty unless the keys were split."""
    *arguments, out = _FUNCTIONAL_ARGUMENTS.bind(args, kwargs)
    _check_no_out(out)
    out, lse = dispatch.forward(*arguments)
    return out, lse, *no_accumulators(out, 2)


def _flash_attn_forward_fake(*args, **kwargs):
    q, k, v, extras, options, out = _FUNCTIONAL_ARGUMENTS.bind(args, kwargs)
    _check_no_out(out)
    call = forward_signature(q, k, v, extras, plain_options(options))
    validation.check_without_sizes(call)
    out = q.new_empty(call.out_shape)
    return out, out.new_empty(call.lse_shape, dtype=torch.float32), *no_accumulators(out, 2)


def _check_no_out(out: torch.Tensor | None) -> None:
    if out is not None:
        raise invalid(
            TypeError, "out_", "a tensor", "None: the functional operator allocates its output, fwd takes one"
        )


def _fwd(*args, **kwargs):
    """``fwd``, composite: the functional operator and a copy into ``out``, or, unwatched, straight into ``out``."""
    q, k, v, extras, options, out = _FWD_ARGUMENTS.bind(args, kwargs)
    validation.check_last_strides(q=q, k=k, v=v, out=out)
    if operators_are_watched(q, k, v) or gradient_is_wanted(q, k, v):
        result, *others = call_functional(q, k, v, extras, options)
        if out is None:
            return result, *others
        validation.check_out(out, result)
        return out.copy_(result), *others
    out, lse = dispatch.forward(q, k, v, extras, options, out)
    return out, lse, *no_accumulators(out, 2)


# -- gradients ---------------------------------------------------------------------------------------------


def setup_context(ctx, inputs, output) -> None:
    q, k, v, extras, options, _ = _FUNCTIONAL_ARGUMENTS.bind(inputs, {})
    out, lse, *_ = output
    ctx.save_for_backward(q, k, v, out, lse, *extras[:NUM_INDEX_TENSORS])
    ctx.options, ctx.deterministic = options, _DETERMINISTIC(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, *accumulators):
    q, k, v, out, lse, *index_tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    arguments = (q, k, v, out, lse, index_tensors, ctx.options, ctx.deterministic, wanted)
    return *call_gradients(dout, dlse, *arguments), *(None for _ in ctx.needs_input_grad[3:])


LIBRARY.impl("fwd", _fwd, "CompositeImplicitAutograd")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("_flash_attn_forward", _functional_forward, _key)
torch.library.register_fake("flash_attn_3::_flash_attn_forward", _flash_attn_forward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "flash_attn_3::_flash_attn_forward", _backward, setup_context=setup_context, lib=LIBRARY
)


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    out_: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    kv_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    seqlens_rotary: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The functional operator, as a function whose parameters programs read: (out, lse, out_accum, lse_accum).

    The parameters and their order are FlashAttention-3's. Those of `flash_attn_func` mean the same here; the others
    are not available yet and must be None, or have no effect. The accumulators are empty.
    """
    return _FUNCTIONAL(
        *(q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k),
        *(max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary),
        *(q_descale, k_descale, v_descale, softmax_scale, causal, window_size_left, window_size_right),
        *(attention_chunk, softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin),
    )
