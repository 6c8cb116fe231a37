"""The online softmax of the kernels: base 2, one reference score and sum per query row."""

from __future__ import annotations

import math

import torch

from ..config import Rescale

NEG_INF = float("-inf")


#: How far, in the base-2 exponent, a row's maximum may grow before its reference follows. Kernels with ON_OVERFLOW look
#: at a block's sum instead, which is as large as that.
HEADROOM = {Rescale.EAGER: 0.0, Rescale.LAZY: 8.0, Rescale.ON_OVERFLOW: 15.0}


class OnlineSoftmax:
    """Softmax over score * exp2_scale in base 2, taken block by block.

    Exponents are relative to a reference, a raw score, which follows the row's maximum when that has grown by more
    than `HEADROOM`. Sums and outputs of a row share it, so the result is exact either way.

    Args:
        row_shape: shape of the rows, (..., m).
        exp2_scale: positive factor of the exponent.
        dtype: accumulation type.
        rescale: when the reference follows the maximum.
    """

    def __init__(self, row_shape: tuple[int, ...], exp2_scale: float, dtype: torch.dtype, rescale: Rescale):
        self.exp2_scale = exp2_scale
        self.headroom = HEADROOM[rescale]
        self.reference = torch.full(row_shape, NEG_INF, dtype=dtype, device="cpu")
        self.row_sum = torch.zeros(row_shape, dtype=dtype, device="cpu")

    def update(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one block of scores, (..., m, n), -inf where masked.

        Returns:
            The block's unnormalized probabilities (..., m, n), and the factor (..., m) that brings what was
            accumulated before to the new reference.
        """
        # False for a row that has seen no key yet: -inf - -inf is NaN.
        grows = (scores.amax(-1) - self.reference) * self.exp2_scale > self.headroom
        reference = torch.where(grows, scores.amax(-1), self.reference)
        # Such a row keeps the reference -inf; 0 in its place keeps NaN out of the exponent.
        finite_reference = torch.where(reference == NEG_INF, 0.0, reference)
        exponent_shift = finite_reference * self.exp2_scale
        correction = torch.where(grows, torch.exp2((self.reference - finite_reference) * self.exp2_scale), 1.0)
        probabilities = torch.exp2(scores * self.exp2_scale - exponent_shift[..., None])
        self.row_sum = self.row_sum * correction + probabilities.sum(-1)
        self.reference = reference
        return probabilities, correction

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor that normalises the accumulated output, and the natural-log LSE; both (..., m).

        A row without a visible key gets 0 and -inf.
        """
        has_no_key = self.row_sum == 0
        normalizer = torch.where(has_no_key, 0.0, 1.0 / self.row_sum)
        lse = self.reference * (self.exp2_scale * math.log(2.0)) + torch.log(self.row_sum)
        return normalizer, torch.where(has_no_key, NEG_INF, lse)
