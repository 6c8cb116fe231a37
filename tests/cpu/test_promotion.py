"""Why very long outputs are accumulated in two levels: a model of the tensor cores' accumulator."""

import numpy as np
import pytest

from flash_attn_3.config import PROMOTION_KEYS

HEAD_DIM, ROWS, MMA_DEPTH = 64, 8, 16
#: bfloat16 rounds to this, relatively.
BF16_ROUNDING = 2.0**-9


def truncated(x: np.ndarray) -> np.ndarray:
    """To 24 bits of mantissa, towards zero."""
    nearest = x.astype(np.float32)
    too_large = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(too_large, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


def scale_after(num_keys: int) -> float:
    """What becomes of the scale of an output that is added up in one accumulator, 16 keys at a time."""
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((ROWS, num_keys))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = np.zeros((ROWS, HEAD_DIM))
    accumulator = np.zeros((ROWS, HEAD_DIM))
    for key in range(0, num_keys, MMA_DEPTH):
        product = weights[:, key : key + MMA_DEPTH] @ draw.standard_normal((MMA_DEPTH, HEAD_DIM))
        exact += product
        accumulator = truncated(accumulator + product)
    return float((accumulator * exact).sum() / (exact * exact).sum())


def test_one_level_shrinks_by_less_than_the_rounding_of_the_output():
    shrinkage = 1.0 - scale_after(PROMOTION_KEYS)
    assert 0.0 < shrinkage <= BF16_ROUNDING / 4


@pytest.mark.parametrize("num_keys", [PROMOTION_KEYS // 8, PROMOTION_KEYS // 2])
def test_shrinkage_grows_with_the_length(num_keys):
    """So that a level must end somewhere."""
    assert 1.0 - scale_after(num_keys) < 1.0 - scale_after(2 * num_keys)
