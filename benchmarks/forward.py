"""Suite fwd: the forward pass."""

from __future__ import annotations

import torch
from tests.reference import AttentionOptions, attention

from . import comparison, fa3, peers
from .comparison import Call, Tensors
from .shapes import AttentionShape

#: (batch, query head) pairs whose output is compared with the reference, spread over the tensor.
CHECKED_HEADS = 3


class Forward(comparison.Pass):
    """Inputs are q, k and v; the result is out."""

    suite = "fwd"
    flops = 1.0

    def inputs(self, shape: AttentionShape, dtype: torch.dtype) -> Tensors:
        return tuple(comparison.random_tensors(shape.input_shapes, dtype))

    def call(self, version: str, inputs: Tensors, shape: AttentionShape) -> Call:
        forward = peers.BUILDERS[version](*inputs, shape)
        return lambda: (forward(),)

    def reference(self, inputs: Tensors, shape: AttentionShape) -> Tensors:
        """Attention in float64 for the checked heads: all of their rows, (rows, head_dim)."""
        options = AttentionOptions(causal=shape.causal, window_size=shape.window)
        group = shape.heads_q // shape.heads_kv
        expected = []
        for sequence, head in _checked_heads(shape):
            heads = (head, head // group, head // group)
            one_head = (
                comparison.sequence_rows(x, shape, sequence)[None, :, h : h + 1]
                for x, h in zip(inputs, heads, strict=True)
            )
            out, _ = attention(*one_head, options)
            expected.append(out[0, :, 0])
        return (torch.cat(expected),)

    def checked(self, results: Tensors, shape: AttentionShape) -> Tensors:
        (out,) = results
        rows = [comparison.sequence_rows(out, shape, sequence)[:, head] for sequence, head in _checked_heads(shape)]
        return (torch.cat(rows),)

    def fa3_over_cudnn(self, shape: AttentionShape) -> float | None:
        return fa3.forward_ratio(shape)


def _checked_heads(shape: AttentionShape) -> list[tuple[int, int]]:
    return comparison.spread_heads(shape, shape.heads_q, CHECKED_HEADS)
