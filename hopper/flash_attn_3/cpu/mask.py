"""Masks over one tile of scores."""

from __future__ import annotations

import torch

from ..block_range import row_keys
from ..problem import MaskSpec


def visible_pairs(mask: MaskSpec, rows: range, keys: range, len_q: int, len_k: int) -> torch.Tensor:
    """Which of ``keys`` each of ``rows`` may see: bool (len(rows), len(keys))."""
    intervals = [row_keys(mask, row, len_q, len_k) for row in rows]
    begin = torch.tensor([interval.start for interval in intervals], device="cpu")[:, None]
    end = torch.tensor([interval.stop for interval in intervals], device="cpu")[:, None]
    key = torch.arange(keys.start, keys.stop, device="cpu")
    return (begin <= key) & (key < end)
