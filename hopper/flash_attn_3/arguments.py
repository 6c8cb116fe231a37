"""Options in the guises that callers give them, and the one form of error about an argument."""

from __future__ import annotations

import numbers
import operator
import sys
from typing import Any

import torch


def invalid(kind: type[Exception], name: str, given: object, allowed: str) -> Exception:
    """An exception that names the argument, what came and what is allowed."""
    return kind(f"{name}: got {given}; it must be {allowed}")


def window_sides(window_size: Any) -> tuple[int, int]:
    """(left, right) of any pair of ints, a list or a tensor too; None, as the pair or as a side, means unlimited."""
    if window_size is None:
        return -1, -1
    try:
        left, right = window_size[0], window_size[1]
    except (TypeError, IndexError, KeyError) as error:
        raise invalid(TypeError, "window_size", repr(window_size), "a pair of ints (left, right)") from error
    if left.__class__ is not int:
        left = -1 if left is None else plain_int("window_size[0]", left)
    if right.__class__ is not int:
        right = -1 if right is None else plain_int("window_size[1]", right)
    return left, right


def plain_int(name: str, value: Any) -> int:
    """An int of anything that stands for one: a numpy integer, an integer tensor of one element.

    A symbolic int stays symbolic, so that a compiled graph is not tied to one value.
    """
    if isinstance(value, torch.SymInt) or _is_traced(name, value):
        return value
    try:
        return operator.index(value)
    except TypeError as error:
        raise invalid(TypeError, name, f"{value!r} of type {type(value).__name__}", "an int") from error


def plain_bool(name: str, value: Any, allowed: str = "True or False") -> bool:
    """A bool of anything that stands for one: 0, 1, a numpy bool.

    Anything else would count as True, a text "no" too.
    """
    if value is True or value is False:
        return value
    _is_traced(name, value)
    if isinstance(value, torch.SymBool) or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    numpy = sys.modules.get("numpy")  # without it there are no numpy bools either
    if numpy is not None and isinstance(value, numpy.bool_):
        return bool(value)
    raise invalid(TypeError, name, f"{value!r} of type {type(value).__name__}", allowed)


def plain_float(name: str, value: Any) -> float:
    """A float of anything that stands for one: an int, a numpy float, a tensor of one element."""
    if _is_traced(name, value):
        return value
    if isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return float(value)
    raise invalid(TypeError, name, f"{value!r} of type {type(value).__name__}", "a float")


def _is_traced(name: str, value: Any) -> bool:
    """Whether Dynamo traces the call: then a number stays as it is, a symbolic one too.

    Raises TypeError for a tensor, whose value Dynamo does not know, and for numpy's numbers, of which it makes tensors.
    """
    if not torch.compiler.is_dynamo_compiling():
        return False
    if not isinstance(value, (int, float)):
        raise invalid(TypeError, name, "a tensor or numpy's number", "Python's own number under torch.compile")
    return True


def check_is_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError for a sparse tensor, whose strides mean nothing."""
    if tensor.layout is not torch.strided:
        raise invalid(TypeError, name, f"a tensor of layout {tensor.layout}", "dense (of layout torch.strided)")


def reject_unavailable(**arguments: object) -> None:
    """Raise NotImplementedError naming the first argument that is given although its feature is not there yet."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not available yet; it must be None")


def split_qkv(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of q, k and v in a packed (b, s, 3, h, d), or, with ``num_heads_q``, (b, s, h + 2 * hk, d)."""
    if not isinstance(qkv, torch.Tensor):
        raise invalid(TypeError, "qkv", f"a {type(qkv).__name__}", "a torch.Tensor")
    if num_heads_q is not None:
        num_heads_q = plain_int("num_heads_q", num_heads_q)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        if num_heads_q is not None and num_heads_q != qkv.shape[3]:
            allowed = f"None or qkv's heads, {qkv.shape[3]}, with a 5-dimensional qkv"
            raise invalid(ValueError, "num_heads_q", num_heads_q, allowed)
        return qkv.unbind(dim=2)
    if qkv.dim() != 4:
        allowed = "(batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads_q + 2 * heads_kv, head_dim)"
        raise invalid(ValueError, "qkv", f"shape {tuple(qkv.shape)}", allowed)
    if num_heads_q is None:
        raise invalid(ValueError, "num_heads_q", None, "given with a 4-dimensional qkv")
    heads = qkv.shape[2]
    heads_kv = (heads - num_heads_q) // 2
    if num_heads_q < 1 or heads_kv < 1 or num_heads_q + 2 * heads_kv != heads:
        allowed = "at least 1 and leave an even number of key and value heads"
        raise invalid(ValueError, "num_heads_q", f"{num_heads_q} of qkv's {heads} heads", allowed)
    return qkv.split([num_heads_q, heads_kv, heads_kv], dim=2)
