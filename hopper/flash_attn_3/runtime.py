"""The runtime library `_runtime.so`, loaded at first use: kernels by handle, and their launches.

Tensors pass as they are (anything that speaks DLPack); a launch goes to the current stream of the tensors'
device. Nothing here needs torch, and importing this module needs no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import toolchain
from .config import WARPGROUP_ROWS, SeqLayout
from .errors import RuntimeLibraryError, UnsupportedDeviceError
from .runtime_build import LIBRARY_NAME

if TYPE_CHECKING:
    from .compiler import CompiledKernel

LIBRARY = Path(__file__).resolve().parent / LIBRARY_NAME
BUILD_COMMAND = "python -m flash_attn_3.runtime_build"


@dataclasses.dataclass(frozen=True)
class RuntimeLibrary:
    """The functions of the library, looked up once. Their C++ side is in csrc/runtime/exports.cc."""

    forward_load: Callable[..., int]
    forward_launcher: Callable[..., Callable[..., None]]
    backward_load: Callable[..., int]
    backward_launcher: Callable[..., Callable[..., None]]
    num_sms: Callable[[int], int]
    compute_capability: Callable[[int], tuple[int, int]]
    tensor_map_geometry: Callable[..., list[int]]


def load_library(path: Path) -> RuntimeLibrary:
    """Load a runtime library.

    Raises:
        RuntimeLibraryError: there is no such file, it does not load, or apache-tvm-ffi is missing.
    """
    try:
        import tvm_ffi
    except ImportError as error:
        raise RuntimeLibraryError(
            f"apache-tvm-ffi cannot be imported ({error}); `pip install apache-tvm-ffi`"
        ) from error
    if not path.is_file():
        raise RuntimeLibraryError(f"the runtime library {path} has not been built; build it with `{BUILD_COMMAND}`")
    tvm_ffi.error.register_error("UnsupportedDeviceError", UnsupportedDeviceError)
    try:
        module = tvm_ffi.load_module(path)
        functions = {field.name: getattr(module, field.name) for field in dataclasses.fields(RuntimeLibrary)}
    except (RuntimeError, AttributeError) as error:
        raise RuntimeLibraryError(
            f"the runtime library {path} cannot be loaded ({error}); rebuild it with `{BUILD_COMMAND}`"
        ) from error
    return RuntimeLibrary(**functions)


@functools.cache
def _library() -> RuntimeLibrary:
    return load_library(LIBRARY)


@functools.cache
def load_kernel(kernel: CompiledKernel) -> int:
    """The handle of a compiled forward kernel, valid on every device of its architecture until the process ends.

    Raises:
        RuntimeError: the driver refuses the cubin, or it was built for another version of the runtime.
        UnsupportedDeviceError: there is no CUDA driver.
        RuntimeLibraryError: the runtime library has not been built, or cannot be loaded.
    """
    config = kernel.config
    return _library().forward_load(
        kernel.cubin.read_bytes(),
        kernel.symbol,
        kernel.num_threads,
        kernel.smem_bytes,
        config.swizzle_bytes // config.dtype.num_bytes,
        config.swizzle_bytes_v // config.dtype.num_bytes,
        WARPGROUP_ROWS,
        config.block_n,
        config.promoted_floats,
        config.cluster_size,
        _nvcc_release(kernel),
    )


@functools.cache
def load_backward_kernels(kernels: CompiledKernel) -> int:
    """The handle of the compiled kernels of a backward pass; raises as `load_kernel`."""
    config = kernels.config
    return _library().backward_load(
        kernels.cubin.read_bytes(),
        kernels.symbol,
        kernels.num_threads,
        kernels.smem_bytes,
        config.preprocess_threads,
        config.postprocess_threads,
        config.head_dim,
        config.head_dim_v,
        config.block_m,
        config.block_n,
        config.cluster_size,
        config.num_dq_parts,
        config.swizzle_bytes // config.dtype.num_bytes,
        config.swizzle_bytes_v // config.dtype.num_bytes,
        WARPGROUP_ROWS,
        config.seq_layout is SeqLayout.VARLEN,
        config.takes_turns,
        _nvcc_release(kernels),
    )


def _nvcc_release(kernel: CompiledKernel) -> int:
    """Which nvcc compiled a kernel, as CUDA counts releases: 13000 is 13.0. 0 where that is not known."""
    release = toolchain.release_of(str(kernel.meta.get("nvcc_version")))
    return 0 if release is None else 1000 * release[0] + 10 * release[1]


def forward_launcher(
    handle: int,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_ctas: int,
    packed_heads: int,
    num_value_passes: int,
    heads_per_section: int,
    least_heads_in_last_section: int,
    score_scale: float,
    exp2_scale: float,
    window_left: int,
    window_right: int,
    attention_chunk: int,
) -> Callable[..., None]:
    """A forward pass but for its tensors.

    Returns ``launch(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, promoted_out)``.

    Each call of ``launch`` enqueues one pass on the current stream of the tensors' device and writes ``out`` and
    ``lse``. It does not wait for the GPU, may be captured into a CUDA graph, and may be called by several threads at
    once. The first launch on a device allocates two MiB there for the counters that kernels take their tiles from. With
    ``num_ctas`` 0 or an empty ``out``, nothing is launched.

    Args:
        handle: from `load_kernel`.
        max_seqlen_q, max_seqlen_k: longest sequence on each packed side; a dense side's is its tensor's.
        num_ctas, packed_heads, num_value_passes, heads_per_section, least_heads_in_last_section: the launch, from
            `heuristics.ForwardPlan`.
        score_scale: 1.0, or softmax_scale / softcap.
        exp2_scale: softmax_scale * log2(e), or softcap * log2(e).
        window_left, window_right: keys visible to each side of the diagonal, -1 for unlimited.
        attention_chunk: chunk width in keys, 0 for none.

    Args of ``launch``, all by position:
        q: (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim) with ``cu_seqlens_q``; fp16 or bf16.
        k: (batch, seqlen_k, heads_kv, head_dim), or (total_k, heads_kv, head_dim) with ``cu_seqlens_k``.
        v: as ``k``, with head_dim_v columns.
        out: as ``q``, with head_dim_v columns.
        lse: fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q) with ``cu_seqlens_q``.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1) or None.
        seqused_q, seqused_k: int32 (batch) or None.
        promoted_out: fp32 scratch of `heuristics.ForwardPlan.promoted_floats` elements, or None where that is 0.

    Raises:
        ValueError, TypeError: an argument that does not fit; ``launch`` raises before it has launched anything. All
            tensors lie on one CUDA device; q, k, v, out: last stride 1, address and strides between heads, rows and
            sequences multiples of 16 bytes.
        RuntimeError, from ``launch``: the driver reports an error, possibly of earlier work.
    """
    return _library().forward_launcher(
        handle,
        max_seqlen_q,
        max_seqlen_k,
        num_ctas,
        packed_heads,
        num_value_passes,
        heads_per_section,
        least_heads_in_last_section,
        score_scale,
        exp2_scale,
        window_left,
        window_right,
        attention_chunk,
    )


def backward_launcher(
    handle: int,
    *,
    group_parts: int,
    num_ctas: int,
    heads_per_section: int,
    least_heads_in_last_section: int,
    softmax_scale: float,
    score_scale: float,
    exp2_scale: float,
    window_left: int,
    window_right: int,
    attention_chunk: int,
) -> Callable[..., None]:
    """A backward pass but for its tensors.

    Returns ``launch(dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q,
    seqused_k, dq_scratch, key_parts)``.

    Each call of ``launch`` enqueues one pass, three kernels, on the current stream of the tensors' device and writes
    every row of ``dq``, ``dk`` and ``dv``; those that take part in nothing become zeros. It does not wait for the GPU,
    may be captured into a CUDA graph, and may be called by several threads at once. The lengths of packed sequences may
    be any that the tensors hold, and differ from launch to launch.

    Args:
        handle: from `load_backward_kernels`.
        group_parts, num_ctas, heads_per_section, least_heads_in_last_section: the launch, from
            `backward_plan.BackwardPlan`.
        softmax_scale: of the scores.
        score_scale, exp2_scale, window_left, window_right, attention_chunk: as in `forward_launcher`.

    Args of ``launch``, all by position; q, k, v, lse and the index tensors as in `forward_launcher`:
        dout, out: as ``q``, with head_dim_v columns.
        dlse: gradient of ``lse``, shaped like it, or None where it is zero.
        statistics: fp32 scratch of `signature.BackwardSignature.statistics_shape`, contiguous.
        dq, dk, dv: as ``q``, ``k`` and ``v``; the gradients.
        dq_scratch: fp32 scratch of `backward_plan.BackwardPlan.dq_scratch_floats` elements.
        key_parts: fp32 scratch of `backward_plan.BackwardPlan.key_part_floats` elements, or None where that is 0.

    Raises:
        As `forward_launcher`; ValueError, from ``launch``, also where ``q`` or ``k`` is empty or there is no sequence.
    """
    return _library().backward_launcher(
        handle,
        group_parts,
        num_ctas,
        heads_per_section,
        least_heads_in_last_section,
        softmax_scale,
        score_scale,
        exp2_scale,
        window_left,
        window_right,
        attention_chunk,
    )


def num_sms(device_index: int) -> int:
    """Multiprocessors of a CUDA device."""
    return _library().num_sms(device_index)


def compute_capability(device_index: int) -> tuple[int, int]:
    """(major, minor) of a CUDA device."""
    major, minor = _library().compute_capability(device_index)
    return major, minor
