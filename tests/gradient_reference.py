"""Gradients of plain attention, and the rule by which a result counts as right. For any device."""

from __future__ import annotations

import torch

from reference import DENSE, FULL, AttentionOptions, Sequences, assert_same_special_values, attention, forward_tolerance

#: What the rule allows beside the rounding under a softcap.
SOFTCAP_TOLERANCE = 3e-4

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    options: AttentionOptions = FULL,
    sequences: Sequences = DENSE,
    compute_dtype: torch.dtype = torch.float64,
) -> Gradients:
    """(dq, dk, dv) of `reference.attention` through autograd, in compute_dtype.

    Args:
        dout: gradient of out. What it holds in rows that do not exist is ignored.
        dlse: gradient of lse, zero by default; ignored, too, in rows without a key.
        compute_dtype: float64 for a reference, the inputs' own type for the yardstick of `gradient_tolerance`.
    """
    leaves = [x.detach().to(compute_dtype).requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, options, sequences, compute_dtype)
    exists = ~torch.isnan(out.detach())
    if not out.requires_grad:  # no query
        return tuple(torch.zeros_like(x) for x in leaves)
    dout = dout.to(compute_dtype).where(exists, 0.0)
    outputs, output_gradients = [out], [dout]
    if dlse is not None:
        outputs.append(lse)
        output_gradients.append(dlse.to(compute_dtype).where(torch.isfinite(lse.detach()), 0.0))
    found = torch.autograd.grad(outputs, leaves, output_gradients, allow_unused=True)
    return tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found, strict=True))


def gradient_tolerance(reference: torch.Tensor, same_precision: torch.Tensor, softcap: float) -> float:
    """The largest error of a gradient that is rounding; arguments as in `reference.forward_tolerance`."""
    extra = SOFTCAP_TOLERANCE if softcap > 0.0 else 0.0
    return forward_tolerance(reference, same_precision, softcap) + extra


def assert_gradients_close(
    actual: tuple[torch.Tensor | None, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    options: AttentionOptions = FULL,
    sequences: Sequences = DENSE,
) -> None:
    """dq, dk and dv pass the tolerance rule; those that are None are left out."""
    call = (q, k, v, dout, dlse, options, sequences)
    exact, same_precision = gradients(*call), gradients(*call, compute_dtype=q.dtype)
    for name, gradient, reference, yardstick in zip(("dq", "dk", "dv"), actual, exact, same_precision, strict=True):
        if gradient is None:
            continue
        reference = reference.to(q.dtype)
        assert (gradient.shape, gradient.dtype) == (reference.shape, q.dtype), name
        assert_same_special_values(gradient, reference, name)
        if gradient.numel() == 0:
            continue
        error = float((gradient.double() - reference.double()).abs().max())
        allowed = gradient_tolerance(reference, yardstick, options.softcap)
        assert error <= allowed, f"{name}: largest error {error:.3e}, allowed {allowed:.3e}"
