"""What torch may do to a call that these kernels have no rule for: forward-mode derivatives, and transforms.

Neither stops by itself: a kernel reads numbers, and what else a tensor stands for would be lost.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

NO_FORWARD_MODE = (
    "flash_attn_3 has no forward-mode derivative, on no device: the tangent of a dual tensor would be lost. "
    "Use the backward mode of torch.autograd"
)
NO_TRANSFORMS = (
    "flash_attn_3 has no rule for the transforms of torch.func (vmap, grad, vjp, ...) and for is_grads_batched=True. "
    "Put what would be mapped into the batch, and differentiate with torch.autograd, one gradient at a time"
)

#: The dispatch key of what autograd makes of is_grads_batched=True, which is not torch.func's vmap.
_BATCHED = torch._C._parse_dispatch_key("Batched")


def reject_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError for dual tensors; to be asked only where `forward_ad` has a level."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(NO_FORWARD_MODE)


def reject_transforms(*tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError while a transform of torch.func is at work, and for tensors of autograd's own vmap."""
    if torch._C._are_functorch_transforms_active() or any(map(_is_batched, tensors)):
        raise NotImplementedError(NO_TRANSFORMS)


def _is_batched(tensor: torch.Tensor | None) -> bool:
    """Whether ``tensor`` stands for several, as under is_grads_batched=True."""
    return isinstance(tensor, torch.Tensor) and torch._C._dispatch_keys(tensor).has(_BATCHED)


def check_is_recordable(*tensors: torch.Tensor) -> None:
    """Raise NotImplementedError where torch asks for other derivatives than those of autograd's backward mode."""
    if forward_ad._current_level >= 0:
        reject_tangents(*tensors)
    reject_transforms()
