"""The rules a forward call must keep, each with an error that names the argument, what came and what is allowed.

The rules read a `ForwardSignature`, no data, so a signature needs to be judged only once. What a signature
does not hold (strides, and values on the CPU) is checked per call by `check_last_strides` and `check_index_values`.

Wrong types and dtypes raise TypeError, everything else ValueError; what is not there yet, NotImplementedError.
"""

from __future__ import annotations

import numbers

import torch

from .arguments import check_is_dense, invalid
from .problem import HEAD_DIM_STEP, MAX_HEAD_DIM_V, MAX_SEQLEN
from .signature import ForwardSignature, TensorSpec

#: Window sides and chunks are counted in 32 bits.
INT32_MAX = 2**31 - 1
#: Scales are handed to the kernels in fp32, after multiplication by log2(e) < 2.
MAX_SCALE = torch.finfo(torch.float32).max / 2
#: More splits than this cannot be combined.
MAX_NUM_SPLITS = 256
MAX_HEAD_DIM = 256


def check_forward(call: ForwardSignature) -> None:
    """Raise on the first rule that ``call`` breaks."""
    check_without_sizes(call)
    _check_device_type(call)
    _check_sequences(call)
    _check_heads(call)
    _check_head_dims(call)
    _check_descales(call)
    _check_out(call)


def check_without_sizes(call: ForwardSignature) -> None:
    """The rules that compare no sizes, so that they hold for symbolic ones too: dtypes, devices, ranks and options."""
    _check_dtypes(call)
    _check_same_device(call)
    _check_ranks(call)
    _check_options(call)


# -- tensors ---------------------------------------------------------------------------------------------


def _check_dtypes(call: ForwardSignature) -> None:
    if call.q.dtype == torch.float8_e4m3fn:
        raise NotImplementedError(f"q: got dtype {call.q.dtype}; FP8 is not available yet, use float16 or bfloat16")
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        raise invalid(TypeError, "q", f"dtype {call.q.dtype}", "float16 or bfloat16")
    for name in ("k", "v"):
        dtype = getattr(call, name).dtype
        if dtype != call.q.dtype:
            raise invalid(TypeError, name, f"dtype {dtype}", f"of q's dtype, {call.q.dtype}")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        spec = getattr(call, name)
        if spec is not None and spec.dtype != torch.int32:
            raise invalid(TypeError, name, f"dtype {spec.dtype}", "int32")


def _check_device_type(call: ForwardSignature) -> None:
    if call.q.device.type not in ("cuda", "cpu"):
        raise invalid(ValueError, "q", f"device {call.q.device}", "on a CUDA device or on the CPU")


def _check_same_device(call: ForwardSignature) -> None:
    for name, spec in call.tensors.items():
        if spec is not None and spec.device != call.q.device:
            raise invalid(ValueError, name, f"device {spec.device}", f"on q's device, {call.q.device}")


def _check_ranks(call: ForwardSignature) -> None:
    for name, cu_seqlens, dense, packed in (
        ("q", "cu_seqlens_q", "(batch, seqlen_q, heads, head_dim)", "(total_q, heads, head_dim)"),
        ("k", "cu_seqlens_k", "(batch, seqlen_k, heads_kv, head_dim)", "(total_k, heads_kv, head_dim)"),
        ("v", "cu_seqlens_k", "(batch, seqlen_k, heads_kv, head_dim_v)", "(total_k, heads_kv, head_dim_v)"),
    ):
        is_packed = getattr(call, cu_seqlens) is not None
        shape = getattr(call, name).shape
        if len(shape) != (3 if is_packed else 4):
            word = "with" if is_packed else "without"
            raise invalid(ValueError, name, _shape(shape), f"{packed if is_packed else dense} {word} {cu_seqlens}")
    for side in ("q", "k"):
        cu_seqlens = getattr(call, f"cu_seqlens_{side}")
        if cu_seqlens is None:
            continue
        if len(cu_seqlens.shape) != 1:
            raise invalid(ValueError, f"cu_seqlens_{side}", _shape(cu_seqlens.shape), "of shape (batch + 1,)")
        if getattr(call, f"max_seqlen_{side}") is None:
            raise invalid(ValueError, f"max_seqlen_{side}", None, f"given together with cu_seqlens_{side}")


def _check_sequences(call: ForwardSignature) -> None:
    for side in ("q", "k"):
        cu_seqlens = getattr(call, f"cu_seqlens_{side}")
        if cu_seqlens is not None and cu_seqlens.shape[0] < 1:
            raise invalid(ValueError, f"cu_seqlens_{side}", _shape(cu_seqlens.shape), "of shape (batch + 1,)")
        name = f"seqlen_{side}" if cu_seqlens is None else f"max_seqlen_{side}"
        _check_int(name, getattr(call, f"seqlen_{side}"), 0, MAX_SEQLEN)
    if call.v.shape[:-1] != call.k.shape[:-1]:
        allowed = f"shaped like k, {_shape(call.k.shape)}, but for the last dimension"
        raise invalid(ValueError, "v", _shape(call.v.shape), allowed)
    batch_k = call.k.shape[0] if call.cu_seqlens_k is None else call.cu_seqlens_k.shape[0] - 1
    if batch_k != call.batch:
        name = "k" if call.cu_seqlens_k is None else "cu_seqlens_k"
        raise invalid(ValueError, name, f"{batch_k} sequences", f"{call.batch} sequences, as q has")
    for name in ("seqused_q", "seqused_k"):
        spec = getattr(call, name)
        if spec is not None and tuple(spec.shape) != (call.batch,):
            raise invalid(ValueError, name, _shape(spec.shape), f"of shape (batch,) = ({call.batch},)")


def _check_heads(call: ForwardSignature) -> None:
    heads_q, heads_kv = call.q.shape[-2], call.k.shape[-2]
    if heads_kv < 1:
        raise invalid(ValueError, "k", f"{heads_kv} heads", "of at least one head")
    if heads_q % heads_kv != 0:
        raise invalid(ValueError, "q", f"{heads_q} heads", f"of a multiple of k's heads, {heads_kv}")


def _check_head_dims(call: ForwardSignature) -> None:
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    allowed = f"a multiple of {HEAD_DIM_STEP} from {HEAD_DIM_STEP} to "
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        raise invalid(ValueError, "q", f"head_dim {head_dim}", allowed + str(MAX_HEAD_DIM))
    if call.k.shape[-1] != head_dim:
        raise invalid(ValueError, "k", f"head_dim {call.k.shape[-1]}", f"q's, {head_dim}")
    if not 0 < head_dim_v <= MAX_HEAD_DIM_V or head_dim_v % HEAD_DIM_STEP:
        raise invalid(ValueError, "v", f"head_dim_v {head_dim_v}", allowed + str(MAX_HEAD_DIM_V))
    narrower = 128 < head_dim <= 192 and 96 < head_dim_v <= 128
    wider = head_dim <= 64
    if head_dim_v != head_dim and not narrower and not wider:
        raise invalid(
            ValueError,
            "v",
            f"head_dim_v {head_dim_v} with head_dim {head_dim}",
            "head_dim itself; up to 512 where head_dim <= 64; or in (96, 128] where head_dim is in (128, 192]",
        )


def _check_descales(call: ForwardSignature) -> None:
    """Descales belong to FP8, which is the only dtype that reads them; a malformed one is an error all the same."""
    shape = (call.batch, call.k.shape[-2])
    for name in ("q_descale", "k_descale", "v_descale"):
        spec = getattr(call, name)
        if spec is None:
            continue
        if spec.dtype != torch.float32:
            raise invalid(TypeError, name, f"dtype {spec.dtype}", "float32")
        if tuple(spec.shape) != shape:
            raise invalid(ValueError, name, _shape(spec.shape), f"of shape (batch, heads_kv) = {shape}")


def _check_out(call: ForwardSignature) -> None:
    if call.out is not None:
        check_out(call.out, TensorSpec(call.out_shape, call.q.dtype, call.q.device))


def check_out(out: torch.Tensor | TensorSpec, expected: torch.Tensor | TensorSpec) -> None:
    """A given output tensor must be like the one that the call would have allocated."""
    if out.device != expected.device:
        raise invalid(ValueError, "out", f"device {out.device}", f"on q's device, {expected.device}")
    if out.dtype != expected.dtype:
        raise invalid(TypeError, "out", f"dtype {out.dtype}", f"of q's dtype, {expected.dtype}")
    if tuple(out.shape) != tuple(expected.shape):
        raise invalid(ValueError, "out", _shape(out.shape), f"of shape {tuple(expected.shape)}")


# -- options ---------------------------------------------------------------------------------------------


def _check_options(call: ForwardSignature) -> None:
    _check_int("window_size[0]", call.window_size[0])
    _check_int("window_size[1]", call.window_size[1])
    _check_int("attention_chunk", call.attention_chunk, 0, INT32_MAX)
    _check_int("sm_margin", call.sm_margin, 0)
    _check_int("num_splits", call.num_splits, None, MAX_NUM_SPLITS)
    if call.num_splits > 1:
        raise NotImplementedError(
            f"num_splits: got {call.num_splits}; splitting the keys is not available yet, use 1 or 0 (chosen for you)"
        )
    if not 0 <= call.softcap <= MAX_SCALE:
        raise invalid(ValueError, "softcap", call.softcap, f">= 0 (0 switches it off) and at most {MAX_SCALE:.3g}")
    if call.softmax_scale is not None and not 0 < call.softmax_scale <= MAX_SCALE:
        raise invalid(ValueError, "softmax_scale", call.softmax_scale, f"> 0 and at most {MAX_SCALE:.3g}")
    # The default scale of a symbolic head dim is symbolic, and never so large that it matters.
    if call.softcap > 0 and not isinstance(call.scale, torch.SymFloat) and call.scale / call.softcap > MAX_SCALE:
        allowed = f"so large that softmax_scale / softcap is at most {MAX_SCALE:.3g}"
        raise invalid(ValueError, "softcap", call.softcap, allowed)


def _check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    if not isinstance(value, numbers.Integral):
        raise invalid(TypeError, name, f"{value!r} of type {type(value).__name__}", "an int")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = [f">= {low}" if low is not None else "", f"<= {high}" if high is not None else ""]
        raise invalid(ValueError, name, value, " and ".join(filter(None, limits)))


def check_sm_margin(sm_margin: int, num_sms: int) -> None:
    """At least one multiprocessor must be left to the kernel."""
    if sm_margin >= num_sms:
        raise invalid(ValueError, "sm_margin", sm_margin, f"less than the device's {num_sms} multiprocessors")


# -- what a signature cannot show --------------------------------------------------------------------------


def check_last_strides(**tensors: torch.Tensor | None) -> None:
    """Rows must be contiguous: TMA reads 16 bytes along the last dimension."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_is_dense(name, tensor)
        if tensor.stride()[-1:] not in ((1,), ()):
            given = f"stride {tensor.stride(-1)} in the last dimension"
            raise invalid(ValueError, name, given, "contiguous in the last dimension (stride 1)")


def check_index_values(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    """Index tensors on the CPU: they are read as plain arrays, and the rows that they name must exist.

    No sequence may have more rows than max_seqlen says, counted after seqused has cut it; without cu_seqlens it is not
    read. On a GPU the runtime checks the strides; the values it does not see.
    """
    index_tensors = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
    }
    for name, tensor in index_tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise invalid(ValueError, name, f"strides {tensor.stride()}", "contiguous")
    for side, rows, max_seqlen in (("q", q, max_seqlen_q), ("k", k, max_seqlen_k)):
        cu_seqlens, seqused = index_tensors[f"cu_seqlens_{side}"], index_tensors[f"seqused_{side}"]
        if cu_seqlens is not None:
            _check_offsets(f"cu_seqlens_{side}", cu_seqlens, side, rows.shape[0])
            lengths = cu_seqlens.diff() if seqused is None else cu_seqlens.diff().minimum(seqused)
            _check_longest(f"max_seqlen_{side}", max_seqlen, max(lengths.tolist(), default=0))


def _check_offsets(name: str, cu_seqlens: torch.Tensor, side: str, num_rows: int) -> None:
    """Where sequences begin and end: within the rows, and one after another."""
    least, largest = map(int, cu_seqlens.aminmax())
    if least < 0 or largest > num_rows:
        given = f"offsets from {least} to {largest}"
        raise invalid(ValueError, name, given, f"offsets from 0 to {num_rows}, the rows of {side}")
    (falls,) = torch.nonzero(cu_seqlens.diff() < 0, as_tuple=True)
    if len(falls) > 0:
        begin, end = cu_seqlens[falls[0] : falls[0] + 2].tolist()
        raise invalid(ValueError, name, f"{end} after {begin}", "offsets that never decrease")


def _check_longest(name: str, max_seqlen: int, longest: int) -> None:
    if longest > max_seqlen:
        raise invalid(ValueError, name, max_seqlen, f"at least {longest}, the rows of the longest sequence")


def _shape(shape: torch.Size) -> str:
    return f"shape {tuple(shape)}"
