"""Suites bwd and fwd+bwd: the gradients of q, k and v, alone and together with the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from tests.reference import AttentionOptions, attention

from flash_attn_3.backward_config import Accumulation
from flash_attn_3.backward_plan import BackwardProblem, plan_backward
from flash_attn_3.launch import forward_problem
from flash_attn_3.problem import HOPPER_SMS
from flash_attn_3.signature import ForwardOptions, backward_signature

from . import comparison, fa3, peers
from .comparison import Call, Tensors
from .shapes import BACKWARD_FLOPS, AttentionShape

#: (batch, key head) pairs whose gradients are compared with the reference, spread over the tensor.
CHECKED_HEADS = 3
#: Scores that the reference differentiates at a time; autograd keeps several tensors of them (0.5 GB each).
MAX_SCORES = 2**26
_FLOAT_BYTES = 4


class Backward(comparison.Pass):
    """Inputs are q, k, v and dout; the results are dq, dk and dv, of a graph that is kept."""

    suite = "bwd"
    own = peers.OWN
    flops = BACKWARD_FLOPS

    def inputs(self, shape: AttentionShape, dtype: torch.dtype) -> Tensors:
        q, k, v, dout = comparison.random_tensors((*shape.input_shapes, shape.out_shape), dtype)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def call(self, version: str, inputs: Tensors, shape: AttentionShape) -> Call:
        *leaves, dout = inputs
        out = peers.BUILDERS[version](*leaves, shape)()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def reference(self, inputs: Tensors, shape: AttentionShape) -> Tensors:
        """Gradients in float64 for the checked key heads and the query heads that see them, all of their rows."""
        detached = [x.detach() for x in inputs]
        q_dout, k_v = (detached[0], detached[3]), (detached[1], detached[2])
        found = []
        for sequence, head in _checked_heads(shape):
            q, dout = (comparison.sequence_rows(x, shape, sequence)[:, _query_heads(shape, head)] for x in q_dout)
            k, v = (comparison.sequence_rows(x, shape, sequence)[:, head : head + 1] for x in k_v)
            found.append(_head_gradients(q, k, v, dout, shape))
        return tuple(torch.cat(gradients) for gradients in zip(*found, strict=True))

    def checked(self, results: Tensors, shape: AttentionShape) -> Tensors:
        picked: list[list[torch.Tensor]] = [[], [], []]
        for sequence, head in _checked_heads(shape):
            heads = (_query_heads(shape, head), slice(head, head + 1), slice(head, head + 1))
            for gradients, result, which in zip(picked, results, heads, strict=True):
                gradients.append(comparison.sequence_rows(result, shape, sequence)[:, which])
        return tuple(map(torch.cat, picked))

    def fa3_over_cudnn(self, shape: AttentionShape) -> float | None:
        return fa3.backward_ratio(shape)

    def inspect(self, version: str, call: Call) -> dict[str, Any]:
        noted: dict[str, Any] = {"workspace_bytes": _workspace_bytes(call)}
        if version == peers.DETERMINISTIC:
            noted["repeats"] = all(map(torch.equal, call(), call()))
        return noted

    def describe(self, shape: AttentionShape, dtype: torch.dtype) -> dict[str, Any]:
        """Bytes of the scratch tensors that this package's kernels are given."""
        return {"scratch_bytes": {name: scratch_bytes(shape, dtype, name) for name in self.own}}


class ForwardBackward(Backward):
    """Both passes; inputs and results are those of the backward pass alone."""

    suite = "fwd+bwd"
    flops = 1.0 + BACKWARD_FLOPS

    def call(self, version: str, inputs: Tensors, shape: AttentionShape) -> Call:
        *leaves, dout = inputs
        forward = peers.BUILDERS[version](*leaves, shape)
        return lambda: torch.autograd.grad(forward(), leaves, dout)

    def fa3_over_cudnn(self, shape: AttentionShape) -> float | None:
        return fa3.both_ratio(shape)


# -- the reference ---------------------------------------------------------------------------------------


def _checked_heads(shape: AttentionShape) -> list[tuple[int, int]]:
    return comparison.spread_heads(shape, shape.heads_kv, CHECKED_HEADS)


def _query_heads(shape: AttentionShape, head: int) -> slice:
    """The query heads that share a key head."""
    group = shape.heads_q // shape.heads_kv
    return slice(head * group, (head + 1) * group)


def _head_gradients(
    q: torch.Tensor,  # (s, group, d)
    k: torch.Tensor,  # (s, 1, d)
    v: torch.Tensor,  # (s, 1, dv)
    dout: torch.Tensor,  # (s, group, dv)
    shape: AttentionShape,
) -> Tensors:
    """(dq, dk, dv) in float64, a block of query rows at a time."""
    options = AttentionOptions(causal=shape.causal, window_size=shape.window)
    # Masks are aligned to the last row: a block's are right if its keys end where it does.
    ends_at_diagonal = shape.causal or shape.window[1] == 0
    if not ends_at_diagonal and shape.mask == "window":
        raise ValueError(f"{shape.name}: gradients of windows are measured with nothing to the right of the diagonal")
    seqlen, group, _ = q.shape
    block = max(1, MAX_SCORES // (group * seqlen))
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    for begin in range(0, seqlen, block):
        rows = slice(begin, min(begin + block, seqlen))
        keys = slice(0, rows.stop if ends_at_diagonal else seqlen)
        leaves = [x[which][None].double().requires_grad_() for x, which in ((q, rows), (k, keys), (v, keys))]
        out, _ = attention(*leaves, options, max_scores=MAX_SCORES)
        gradients = torch.autograd.grad(out, leaves, dout[rows][None].double())
        for total, which, gradient in zip((dq, dk, dv), (rows, keys, keys), gradients, strict=True):
            total[which] += gradient[0]
    return dq, dk, dv


# -- memory ----------------------------------------------------------------------------------------------


def _workspace_bytes(call: Call) -> int | None:
    """Most memory that a call holds beside its results, as torch counts it; None on devices where it does not."""
    if comparison.DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    return torch.cuda.max_memory_allocated() - held - sum(x.untyped_storage().nbytes() for x in results)


def scratch_bytes(shape: AttentionShape, dtype: torch.dtype, version: str) -> int:
    """What the plan of one of this package's versions says: statistics of the query rows, dq in fp32, and dk and dv
    where they are added up."""
    q, k, v, out = (torch.empty(size, dtype=dtype, device="meta") for size in (*shape.input_shapes, shape.out_shape))
    lse = torch.empty(0, device="meta")  # its size does not matter to the plan
    index_tensors, lengths = (None,) * 4, (None, None)
    if shape.is_varlen:
        packed = peers.packed(shape, q.device)
        index_tensors = (packed["cu_seqlens_q"], packed["cu_seqlens_k"], None, None)
        lengths = (packed["max_seqlen_q"], packed["max_seqlen_k"])
    options = ForwardOptions(*lengths, causal=shape.causal, window_size=shape.window)
    is_deterministic = version == peers.DETERMINISTIC
    call = backward_signature(out, None, q, k, v, out, lse, index_tensors, options, is_deterministic)
    accumulation = Accumulation.ORDERED if is_deterministic else Accumulation.UNORDERED
    plan = plan_backward(BackwardProblem(forward_problem(call.forward, HOPPER_SMS), accumulation))
    statistics = math.prod(call.statistics_shape(plan.config.block_m))
    key_parts = plan.key_part_floats(call.num_key_blocks(plan.config.block_n))
    return _FLOAT_BYTES * (statistics + plan.dq_scratch_floats(statistics // 2) + key_parts)
