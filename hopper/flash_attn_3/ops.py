"""The operators of `torch.ops.flash_attn_3`, for torch.compile, torch.export and callers of the raw operators.

``_flash_attn_forward`` is functional: it has a kernel, a fake and an autograd formula. ``fwd`` takes an ``out``
that it may write and return, which functionalisation refuses in an operator with a kernel of its own; so ``fwd``
is composite, and what a graph records is the functional operator (and a copy into ``out``).

In eager mode nothing goes through the dispatcher: `attend` calls `dispatch.forward` directly, which saves most of
the CPU time of a call, unless somebody watches operators (a compiler, a fake or another dispatch mode).
"""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch, validation
from .arguments import reject_unavailable, window_sides
from .signature import forward_signature

NO_BACKWARD = (
    "the backward pass of flash_attn_3 is not available yet: call the function under torch.no_grad(), "
    "or detach q, k and v"
)

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
    Tensor? scheduler_metadata=None, int num_splits=1, bool? pack_gqa=None, int sm_margin=0
) -> (Tensor, Tensor, Tensor, Tensor)"""

_LIBRARY = torch.library.Library("flash_attn_3", "DEF")
_LIBRARY.define(_FWD_SCHEMA)
_LIBRARY.define(_FUNCTIONAL_SCHEMA)
# A backward pass that can be traced, so that a graph with gradients compiles, and that raises only when it runs.
_LIBRARY.define("_missing_backward(Tensor dout, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)")

_FWD = torch.ops.flash_attn_3.fwd.default
_FUNCTIONAL = torch.ops.flash_attn_3._flash_attn_forward.default
_ARGUMENTS = tuple(argument.name for argument in _FUNCTIONAL._schema.arguments)
#: Arguments of the operators whose features are not there yet, under their python names.
_UNAVAILABLE = (
    "k_new",
    "v_new",
    "qv",
    "cu_seqlens_k_new",
    "page_table",
    "kv_batch_idx",
    "leftpad_k",
    "rotary_cos",
    "rotary_sin",
    "seqlens_rotary",
    "scheduler_metadata",
)
#: Arguments that change nothing: a performance hint, and the style of a rotation that is not there yet.
_WITHOUT_EFFECT = ("pack_gqa", "rotary_interleaved")
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
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
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the shortest way: `dispatch.forward`, or the functional operator where it must be seen.

    The arguments are passed on one by one: collecting them in a dictionary takes a quarter of a call's CPU time.
    """
    if qv is not None:
        reject_unavailable(qv=qv)
    if not operators_are_watched(q):
        return dispatch.forward(
            q,
            k,
            v,
            None,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            max_seqlen_q,
            max_seqlen_k,
            q_descale,
            k_descale,
            v_descale,
            softmax_scale,
            causal,
            window_size,
            attention_chunk,
            softcap,
            num_splits,
            sm_margin,
        )
    window_left, window_right = window_sides(window_size)
    out, lse, _, _ = _FUNCTIONAL(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=bool(causal),
        window_size_left=window_left,
        window_size_right=window_right,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    return out, lse


def operators_are_watched(q: torch.Tensor) -> bool:
    """Whether somebody must see an operator: a compiler, a tensor subclass (fake, functional, ...), a dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return q.__class__ not in _PLAIN_TENSORS and isinstance(q, torch.Tensor)


def gradient_is_wanted(*tensors: torch.Tensor) -> bool:
    """Whether autograd must record a call on ``tensors`` (what is no tensor is judged later)."""
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)


# -- kernels -----------------------------------------------------------------------------------------------


def _bind(operator: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments with the schema's defaults, under the names of ``_flash_attn_forward``.

    Both forward operators have the same arguments in the same order; only names and defaults differ. Arguments of
    features that are not there yet raise if they are given, and are left out.
    """
    arguments = {}
    for i, (name, argument) in enumerate(zip(_ARGUMENTS, operator._schema.arguments, strict=True)):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        if name in _UNAVAILABLE:
            reject_unavailable(**{argument.name: value})
        else:
            arguments[name] = value
    return arguments


def _dispatchable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as `dispatch.forward` takes them."""
    arguments = {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}
    if arguments.pop("out_", None) is not None:
        raise TypeError(
            "out_: got a tensor; it must be None: the functional operator allocates its output, fwd takes one"
        )
    arguments["window_size"] = (arguments.pop("window_size_left"), arguments.pop("window_size_right"))
    return arguments


def _functional_forward(*args, **kwargs):
    """(out, lse, out_accum, lse_accum); the accumulators are empty unless the keys were split."""
    out, lse = dispatch.forward(**_dispatchable(_bind(_FUNCTIONAL, args, kwargs)))
    return out, lse, *_no_accumulators(out)


def _flash_attn_forward_fake(*args, **kwargs):
    arguments = _dispatchable(_bind(_FUNCTIONAL, args, kwargs))
    call = forward_signature(**arguments)
    validation.check_tensors(call)
    out = arguments["q"].new_empty(call.out_shape)
    return out, out.new_empty(call.lse_shape, dtype=torch.float32), *_no_accumulators(out)


def _no_accumulators(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return out.new_empty((0,), dtype=torch.float32), out.new_empty((0,), dtype=torch.float32)


def _fwd(*args, **kwargs):
    """``fwd``, composite: the functional operator and a copy into ``out``, or, unwatched, straight into ``out``."""
    arguments = _bind(_FWD, args, kwargs)
    out = arguments.pop("out_")
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    validation.check_last_strides(q=q, k=k, v=v, out=out)
    if operators_are_watched(q) or gradient_is_wanted(q, k, v):
        result, *others = _FUNCTIONAL(**arguments)
        if out is None:
            return result, *others
        validation.check_out(out, result)
        return out.copy_(result), *others
    out, lse = dispatch.forward(out=out, **_dispatchable(arguments))
    return out, lse, *_no_accumulators(out)


# -- gradients ---------------------------------------------------------------------------------------------


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.num_inputs = len(inputs)


def _backward(ctx, dout, *others):
    gradients = torch.ops.flash_attn_3._missing_backward(dout, *ctx.saved_tensors)
    return *gradients, *(None for _ in range(ctx.num_inputs - 3))


def _missing_backward(dout, q, k, v):
    raise NotImplementedError(NO_BACKWARD)


def _missing_backward_fake(dout, q, k, v):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_LIBRARY.impl("fwd", _fwd, "CompositeImplicitAutograd")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("_flash_attn_forward", _functional_forward, _key)
    _LIBRARY.impl("_missing_backward", _missing_backward, _key)
torch.library.register_fake("flash_attn_3::_flash_attn_forward", _flash_attn_forward_fake, lib=_LIBRARY)
torch.library.register_fake("flash_attn_3::_missing_backward", _missing_backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "flash_attn_3::_flash_attn_forward", _backward, setup_context=setup_context, lib=_LIBRARY
)

#: The functional operator, called like a function: ``_flash_attn_forward(q, k, v, ...)``.
_flash_attn_forward = torch.ops.flash_attn_3._flash_attn_forward
