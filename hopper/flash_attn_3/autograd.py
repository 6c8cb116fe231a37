"""The way that a call of the public functions takes: straight to the kernel, recorded by autograd, or as an operator.

In eager mode nothing goes through the dispatcher, which would take most of the CPU time of a call, unless somebody
watches operators (a compiler, a fake or another dispatch mode).
"""

from __future__ import annotations

import torch

from . import dispatch
from .ops import NO_BACKWARD, call_functional, gradient_is_wanted, operators_are_watched
from .signature import ForwardOptions, OptionalTensors


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: OptionalTensors, options: ForwardOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); the arguments are those of `dispatch.forward`."""
    if operators_are_watched(q):
        # Brings an autograd formula of its own.
        return call_functional(q, k, v, extras, options)[:2]
    if gradient_is_wanted(q, k, v):
        return RecordedForward.apply(q, k, v, extras, options)
    return dispatch.forward(q, k, v, extras, options)


class ForwardOnly(torch.autograd.Function):
    """The backward pass is not there yet, and says so when it is asked for."""

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(NO_BACKWARD)


class RecordedForward(ForwardOnly):
    """`dispatch.forward` on tensors that require a gradient."""

    @staticmethod
    def forward(ctx, q, k, v, extras, options):
        return dispatch.forward(q, k, v, extras, options)
