"""The rules a backward call must keep beside those of the forward call it belongs to; see `validation`."""

from __future__ import annotations

import torch

from . import validation
from .arguments import invalid
from .backward_plan import MAX_BACKWARD_HEAD_DIM
from .signature import BackwardSignature, TensorSpec


def check_backward(call: BackwardSignature) -> None:
    """Raise on the first rule that ``call`` breaks."""
    check_backward_tensors(call)
    validation.check_forward(call.forward)
    _check_head_dims(call)
    for name, (_, shape) in _expected(call).items():
        spec = getattr(call, name)
        if spec is not None and tuple(spec.shape) != tuple(shape):
            raise invalid(ValueError, name, f"shape {tuple(spec.shape)}", f"of shape {tuple(shape)}")


def check_backward_tensors(call: BackwardSignature) -> None:
    """The rules that compare no sizes, so that they hold for symbolic ones too: dtypes, devices, ranks and options."""
    validation.check_without_sizes(call.forward)
    for name, (dtype, shape) in _expected(call).items():
        spec = getattr(call, name)
        if spec is None:
            continue
        if spec.dtype != dtype:
            raise invalid(TypeError, name, f"dtype {spec.dtype}", str(dtype).removeprefix("torch."))
        if spec.device != call.forward.q.device:
            raise invalid(ValueError, name, f"device {spec.device}", f"on q's device, {call.forward.q.device}")
        if len(spec.shape) != len(shape):
            raise invalid(ValueError, name, f"{len(spec.shape)} dimensions", f"of {len(shape)}, like {_LIKE[name]}")


#: What each tensor is shaped like.
_LIKE = {"dout": "out", "softmax_lse": "the forward pass's", "dlse": "softmax_lse", "dq": "q", "dk": "k", "dv": "v"}


def _expected(call: BackwardSignature) -> dict[str, tuple[torch.dtype, torch.Size | tuple[int, ...]]]:
    """Dtype and shape that the tensors must have."""

    def like(spec: TensorSpec) -> tuple[torch.dtype, torch.Size]:
        return call.forward.q.dtype, spec.shape

    lse = (torch.float32, call.forward.lse_shape)
    return {
        "dout": (call.forward.q.dtype, call.forward.out_shape),
        "softmax_lse": lse,
        "dlse": lse,
        "dq": like(call.forward.q),
        "dk": like(call.forward.k),
        "dv": like(call.forward.v),
    }


def _check_head_dims(call: BackwardSignature) -> None:
    """head_dim has this limit in the forward pass, too."""
    head_dim_v = call.forward.v.shape[-1]
    if head_dim_v > MAX_BACKWARD_HEAD_DIM:
        allowed = f"at most {MAX_BACKWARD_HEAD_DIM} to be differentiated"
        raise invalid(ValueError, "v", f"head_dim_v {head_dim_v}", allowed)
