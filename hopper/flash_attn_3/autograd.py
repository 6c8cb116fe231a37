"""The way that a call of the public functions takes: straight to the kernel, recorded by autograd, or as an operator.

In eager mode nothing goes through the dispatcher, which would take most of the CPU time of a call, unless somebody
watches operators (a compiler, a fake or another dispatch mode).
"""

from __future__ import annotations

import torch

from . import dispatch
from .arguments import plain_bool, split_qkv
from .backward_ops import call_gradients
from .ops import call_functional, gradient_is_wanted, operators_are_watched
from .signature import ALL_WANTED, NO_INDEX_TENSORS, NUM_INDEX_TENSORS, ForwardOptions, OptionalTensors, plain_options
from .transforms import check_is_recordable


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: OptionalTensors,
    options: ForwardOptions,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); the arguments are those of `dispatch.forward`, and ``deterministic`` is for the backward pass."""
    if deterministic is not True and deterministic is not False:
        deterministic = plain_bool("deterministic", deterministic)
    if operators_are_watched(q, k, v):
        # Brings an autograd formula of its own.
        return call_functional(q, k, v, extras, options, deterministic)[:2]
    if gradient_is_wanted(q, k, v):
        check_is_recordable(q, k, v)
        return RecordedAttention.apply(q, k, v, extras, options, deterministic)
    return dispatch.forward(q, k, v, extras, options)


def attend_packed(
    qkv: torch.Tensor, num_heads_q: int | None, extras: OptionalTensors, options: ForwardOptions, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` of the parts of one tensor, whose gradient is one tensor, too."""
    if gradient_is_wanted(qkv) and not operators_are_watched(qkv, qkv, qkv):
        check_is_recordable(qkv)
        deterministic = plain_bool("deterministic", deterministic)
        return RecordedPackedAttention.apply(qkv, num_heads_q, extras, options, deterministic)
    return attend(*split_qkv(qkv, num_heads_q), extras, options, deterministic)


class RecordedAttention(torch.autograd.Function):
    """`dispatch.forward` on tensors that require a gradient."""

    @staticmethod
    def forward(ctx, q, k, v, extras, options, deterministic):
        options = plain_options(options)
        out, lse = dispatch.forward(q, k, v, extras, options)
        ctx.save_for_backward(q, k, v, out, lse, *extras[:NUM_INDEX_TENSORS])
        ctx.options, ctx.deterministic = options, deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *index_tensors = ctx.saved_tensors
        arguments = (dout, dlse, q, k, v, out, lse, index_tensors, ctx.options, ctx.deterministic)
        return *_gradients(*arguments, wanted=ctx.needs_input_grad[:3]), None, None, None


class RecordedPackedAttention(torch.autograd.Function):
    """The same on views of one tensor, whose gradient is written in place."""

    @staticmethod
    def forward(ctx, qkv, num_heads_q, extras, options, deterministic):
        options = plain_options(options)
        out, lse = dispatch.forward(*split_qkv(qkv, num_heads_q), extras, options)
        ctx.save_for_backward(qkv, out, lse)
        ctx.num_heads_q, ctx.options, ctx.deterministic = num_heads_q, options, deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        qkv, out, lse = ctx.saved_tensors
        q, k, v = split_qkv(qkv, ctx.num_heads_q)
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        views = split_qkv(dqkv, ctx.num_heads_q)
        arguments = (dout, dlse, q, k, v, out, lse, NO_INDEX_TENSORS, ctx.options, ctx.deterministic)
        gradients = _gradients(*arguments, gradients=views)
        if gradients is not views:
            dqkv = torch.stack(gradients, dim=2) if qkv.dim() == 5 else torch.cat(gradients, dim=2)
        return dqkv, None, None, None, None


def _gradients(dout, dlse, q, k, v, out, lse, index_tensors, options, deterministic, wanted=ALL_WANTED, gradients=None):
    """`dispatch.backward` for autograd, which gives None for a result that nobody differentiates.

    Somebody may want to see an operator: a compiler, or autograd itself, which must know that gradients of gradients
    do not exist. It ignores ``gradients`` and returns others.
    """
    given = [gradient for gradient in (dout, dlse) if gradient is not None]
    if torch.is_grad_enabled() or operators_are_watched(given[0], given[-1], q):
        arguments = (q, k, v, out, lse, index_tensors, options, deterministic, wanted)
        return call_gradients(dout, dlse, *arguments)
    if dout is None:
        dout = torch.zeros_like(out)
    arguments = (q, k, v, out, lse, index_tensors, options, deterministic, wanted, gradients)
    return dispatch.backward(dout, dlse, *arguments)[0]
