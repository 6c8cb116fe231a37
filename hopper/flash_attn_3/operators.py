"""What all operators of `torch.ops.flash_attn_3` share: their library, and how a call of one is read."""

from __future__ import annotations

from typing import Any

import torch

LIBRARY = torch.library.Library("flash_attn_3", "DEF")


def no_accumulators(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Empty tensors beside ``tensor``, in the place of scratch that some operators of FlashAttention-3 return."""
    return [torch.empty(0, dtype=torch.float32, device=tensor.device) for _ in range(count)]


class Arguments:
    """The names and defaults that an operator gives its arguments."""

    def __init__(self, overload: torch._ops.OpOverload):
        arguments = overload._schema.arguments
        self.names = tuple(argument.name for argument in arguments)
        self.defaults = tuple(argument.default_value for argument in arguments)

    def values(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """All arguments of a call in order; the dispatcher leaves out defaults at the end."""
        values = args + self.defaults[len(args) :]
        if kwargs:
            values = tuple(kwargs.get(name, value) for name, value in zip(self.names, values, strict=True))
        return values
