"""Differentiate a case's call, and hold the gradients against those of the plain reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import flash_attn_interface
from gradient_reference import assert_gradients_close
from reference import AttentionOptions, Sequences

from .cases import GradientCase
from .harness import (
    POISONS,
    Tensors,
    _cumulative_list,
    _sequence,
    operator_arguments,
    poisoned_allocations,
    run,
    sequence_arguments,
    sm_margin,
)

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class Incoming:
    """Gradients of the results: dout like out, dlse like lse or None for zero."""

    dout: torch.Tensor
    dlse: torch.Tensor | None = None

    def to(self, device: str) -> Incoming:
        return Incoming(self.dout.to(device), None if self.dlse is None else self.dlse.to(device))


def make_incoming(case: GradientCase, tensors: Tensors) -> Incoming:
    """Random normal numbers; what belongs to rows that do not exist is poisoned."""
    device = tensors.q.device
    generator = torch.Generator(device=device).manual_seed(case.seed + 1)
    shape = tensors.q.shape[:-1]
    dout = torch.randn(*shape, case.dv, generator=generator, device=device).to(case.dtype)
    dlse = torch.randn(*shape, generator=generator, device=device)
    for rows in (dout, dlse):
        for index in range(case.num_sequences if case.used_q is not None else 0):
            _sequence(rows, case.lens_q, index)[case.used_q[index] :] = POISONS[index % len(POISONS)]
        if case.spare_q:
            rows[-case.spare_q :] = POISONS[0]
    return Incoming(dout, dlse.mT.contiguous() if case.with_dlse else None)


def differentiate(case: GradientCase, tensors: Tensors, incoming: Incoming, **options: object) -> Gradients:
    """(dq, dk, dv) of the public function that fits the case; `options` override its arguments.

    Memory that is left unwritten is NaN in them.
    """
    if case.is_varlen and (case.lens_q is None or case.lens_k is None):
        assert not options
        return differentiate_by_operator(case, tensors, incoming)
    leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    arguments: dict[str, object] = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "attention_chunk": case.attention_chunk,
        "softcap": case.softcap,
        "deterministic": case.deterministic,
        "return_attn_probs": True,
        "sm_margin": sm_margin(case, tensors),
        **options,
    }
    with poisoned_allocations():
        if case.is_varlen:
            arguments = sequence_arguments(case, tensors) | arguments
            out, lse = flash_attn_interface.flash_attn_varlen_func(*leaves, **arguments)
        else:
            out, lse = flash_attn_interface.flash_attn_func(*leaves, **arguments)
        results, gradients = [out], [incoming.dout]
        if incoming.dlse is not None:
            results, gradients = [out, lse], [incoming.dout, incoming.dlse]
        return torch.autograd.grad(results, leaves, gradients)


def differentiate_by_operator(
    case: GradientCase,
    tensors: Tensors,
    incoming: Incoming,
    gradients: Gradients | None = None,
    out_layout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Gradients:
    """The same through torch.ops.flash_attn_3.bwd, which takes mixtures of dense and varlen sides and knows no dlse.

    ``gradients``: to be written, allocated by default. ``out_layout``: stores the forward pass's result in another way.
    """
    assert incoming.dlse is None and case.attention_chunk == 0
    out, lse = run(case, tensors)
    if out_layout is not None:
        out = out_layout(out)
    with poisoned_allocations():
        dq, dk, dv = gradients or (torch.empty_like(x) for x in (tensors.q, tensors.k, tensors.v))
        torch.ops.flash_attn_3.bwd(
            *(incoming.dout, tensors.q, tensors.k, tensors.v, out, lse, dq, dk, dv),
            deterministic=case.deterministic,
            **operator_arguments(case, tensors),
        )
    return dq, dk, dv


def check_gradients(case: GradientCase, tensors: Tensors, incoming: Incoming, gradients: Gradients) -> None:
    """Assert that the gradients are right by the tolerance rule, and zero where nothing takes part."""
    options = AttentionOptions(case.softmax_scale, case.causal, case.window_size, case.attention_chunk, case.softcap)
    sequences = Sequences(
        _cumulative_list(case.lens_q),
        _cumulative_list(case.lens_k),
        None if case.used_q is None else list(case.used_q),
        None if case.used_k is None else list(case.used_k),
    )
    inputs = (tensors.q, tensors.k, tensors.v)
    assert_gradients_close(gradients, *inputs, incoming.dout, incoming.dlse, options, sequences)


def check_case(case: GradientCase, tensors: Tensors) -> Gradients:
    """Differentiate and check; returns the gradients."""
    incoming = make_incoming(case, tensors)
    gradients = differentiate(case, tensors, incoming)
    check_gradients(case, tensors, incoming, gradients)
    return gradients
