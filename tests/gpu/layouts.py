"""The same values stored in other ways."""

from __future__ import annotations

import torch


def stored_as(rows: torch.Tensor, *dims: int) -> torch.Tensor:
    """With the dimensions in this order in memory, from the slowest to the fastest."""
    inverse = sorted(range(len(dims)), key=dims.__getitem__)
    return rows.permute(dims).contiguous().permute(inverse)


def padded_rows(rows: torch.Tensor) -> torch.Tensor:
    """With 24 elements of NaN after each row."""
    wide = rows.new_full((*rows.shape[:-1], rows.shape[-1] + 24), float("nan"))
    wide[..., : rows.shape[-1]] = rows
    return wide[..., : rows.shape[-1]]
