"""The sequences of a variable-length batch: how long each is, and its rows as views."""

from __future__ import annotations

import torch


def used_lengths(
    batch: int, rows: torch.Tensor, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None
) -> list[int]:
    """How many rows of each sequence exist: its segment, cut to seqused."""
    segments = [rows.shape[1]] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
    used = segments if seqused is None else seqused.tolist()
    return [max(0, min(length, segment)) for length, segment in zip(used, segments, strict=True)]


def sequence_rows(tensor: torch.Tensor, cu_seqlens: torch.Tensor | None, sequence: int, length: int) -> torch.Tensor:
    """The existing rows of one sequence of (batch, seqlen, ...) or (total, ...), as a view (1, length, ...)."""
    if cu_seqlens is None:
        return tensor[sequence : sequence + 1, :length]
    return tensor.narrow(0, int(cu_seqlens[sequence]), length)[None]
