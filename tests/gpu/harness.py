"""Build a case's tensors, make the call, hold the result against the plain reference."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch

import flash_attn_interface
from flash_attn_3 import launch
from reference import COSINE_TOLERANCE, AttentionOptions, Sequences, assert_lse_close, assert_out_close, attention

from .cases import Case

#: What unused memory is filled with. Infinity and NaN both survive a product with a weight of zero.
POISONS = (float("nan"), float("inf"), float("-inf"))


@dataclasses.dataclass
class Tensors:
    """Arguments of one call. q, k, v: (batch, seqlen, heads, dim), or (total, heads, dim) on a cu_seqlens side."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty and its kin hand out memory full of NaN: what a kernel fails to write, shows."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def make_tensors(case: Case, device: str | torch.device = "cuda") -> Tensors:
    """Random normal q, k and v, but for the case's NaN; every row that belongs to no sequence is poisoned."""
    generator = torch.Generator(device=device).manual_seed(case.seed)

    def rows_of(
        lens: tuple[int, ...] | None, used: tuple[int, ...] | None, seqlen: int, spare: int, heads: int, dim: int
    ) -> torch.Tensor:
        shape = (case.num_sequences, seqlen) if lens is None else (sum(lens) + spare,)
        rows = torch.randn(*shape, heads, dim, generator=generator, device=device, dtype=torch.float32).to(case.dtype)
        poisons = itertools.cycle(POISONS)
        for index in range(case.num_sequences if used is not None else 0):
            _sequence(rows, lens, index)[used[index] :] = next(poisons)
        if spare:
            rows[-spare:] = next(poisons)
        return rows

    tensors = Tensors(
        q=rows_of(case.lens_q, case.used_q, case.seqlen_q, case.spare_q, case.heads_q, case.head_dim),
        k=rows_of(case.lens_k, case.used_k, case.seqlen_k, case.spare_k, case.heads_kv, case.head_dim),
        v=rows_of(case.lens_k, case.used_k, case.seqlen_k, case.spare_k, case.heads_kv, case.dv),
        cu_seqlens_q=_cumulative(case.lens_q, device),
        cu_seqlens_k=_cumulative(case.lens_k, device),
        seqused_q=_int32(case.used_q, device),
        seqused_k=_int32(case.used_k, device),
    )
    for row in case.nan_keys:
        tensors.k.flatten(0, -3)[row, 0, 0] = float("nan")
    return tensors


def run(case: Case, tensors: Tensors, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the public function that fits the case; `options` override its arguments. Returns (out, lse).

    Memory that the call leaves unwritten is NaN in both.
    """
    arguments: dict[str, object] = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "attention_chunk": case.attention_chunk,
        "softcap": case.softcap,
        "return_attn_probs": True,
        "sm_margin": sm_margin(case, tensors),
    }
    q, k, v = tensors.q, tensors.k, tensors.v
    if case.is_varlen and (case.lens_q is None or case.lens_k is None):
        assert not options, "the raw operator is called with the case's own arguments"
        return run_operator(case, tensors)
    with poisoned_allocations():
        if not case.is_varlen:
            return flash_attn_interface.flash_attn_func(q, k, v, **arguments | options)
        arguments |= sequence_arguments(case, tensors)
        return flash_attn_interface.flash_attn_varlen_func(q, k, v, **arguments | options)


def sequence_arguments(case: Case, tensors: Tensors) -> dict[str, object]:
    """Where the sequences of packed sides lie, in the words of all functions."""
    return {
        "cu_seqlens_q": tensors.cu_seqlens_q,
        "cu_seqlens_k": tensors.cu_seqlens_k,
        "max_seqlen_q": None if case.lens_q is None else case.max_seqlen_q,
        "max_seqlen_k": None if case.lens_k is None else case.max_seqlen_k,
        "seqused_q": tensors.seqused_q,
        "seqused_k": tensors.seqused_k,
    }


def operator_arguments(case: Case, tensors: Tensors) -> dict[str, object]:
    """What the raw operators of both passes call alike."""
    return sequence_arguments(case, tensors) | {
        "softmax_scale": case.softmax_scale,
        "is_causal": case.causal,
        "window_size_left": case.window_size[0],
        "window_size_right": case.window_size[1],
        "softcap": case.softcap,
    }


def run_operator(case: Case, tensors: Tensors, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same call through torch.ops.flash_attn_3.fwd, which takes every mixture of dense and varlen sides."""
    with poisoned_allocations():
        result = torch.ops.flash_attn_3.fwd(
            *(tensors.q, tensors.k, tensors.v),
            out=out,
            attention_chunk=case.attention_chunk,
            num_splits=1,
            sm_margin=sm_margin(case, tensors),
            **operator_arguments(case, tensors),
        )
    return result[0], result[1]


def sm_margin(case: Case, tensors: Tensors) -> int:
    """Of the case on the GPU of its tensors."""
    return case.sm_margin(launch.device_sms(tensors.q.device))


def reference(
    case: Case, tensors: Tensors, compute_dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention: (out, lse) in `compute_dtype`, NaN in rows that do not exist."""
    options = AttentionOptions(case.softmax_scale, case.causal, case.window_size, case.attention_chunk, case.softcap)
    sequences = Sequences(
        _cumulative_list(case.lens_q),
        _cumulative_list(case.lens_k),
        None if case.used_q is None else list(case.used_q),
        None if case.used_k is None else list(case.used_k),
    )
    return attention(tensors.q, tensors.k, tensors.v, options, sequences, compute_dtype)


def check(case: Case, tensors: Tensors, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Assert that out and lse are the attention of the tensors, with nothing else written."""
    rows = tensors.q.shape[:-1]
    assert out.dtype == case.dtype and out.shape == (*rows, case.dv), f"out is {out.dtype} {tuple(out.shape)}"
    assert lse.dtype == torch.float32 and lse.shape == rows[:-2] + rows[-1:] + rows[-2:-1], f"lse is {tuple(lse.shape)}"
    exact, exact_lse = reference(case, tensors)
    same_precision, _ = reference(case, tensors, case.dtype)
    assert_out_close(out, exact, same_precision, case.softcap, cosine_tolerance(case, tensors))
    assert_lse_close(lse, exact_lse, atol=lse_tolerance(case, tensors))


def cosine_tolerance(case: Case, tensors: Tensors) -> float:
    """The dtype's own, and under a softcap the square of what the hardware tanh does to a weight, relatively."""
    return COSINE_TOLERANCE[case.dtype] + 2.0 * _softcap_error(case, tensors) ** 2


def lse_tolerance(case: Case, tensors: Tensors) -> float:
    """How far the LSE may be off: the error of a score, since the LSE moves no further than the scores do.

    A score is a sum of head_dim products, added 16 at a time in fp32, each addition good to 2**-23 of the largest
    partial sum, |q| |k| at most.
    """
    num_additions = -(-case.head_dim // 16)
    return 1e-5 + num_additions * 2.0**-23 * _largest_score(case, tensors) + _softcap_error(case, tensors)


def _softcap_error(case: Case, tensors: Tensors) -> float:
    """Error of a capped score: the hardware tanh is good to 2**-11 of its value."""
    return 2.0**-11 * min(case.softcap, _largest_score(case, tensors))


def _largest_score(case: Case, tensors: Tensors) -> float:
    return case.scale * _largest_norm(tensors.q) * _largest_norm(tensors.k)


def _largest_norm(rows: torch.Tensor) -> float:
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    norms = norms[norms.isfinite()]
    return float(norms.max()) if norms.numel() else 0.0


def _sequence(rows: torch.Tensor, lens: tuple[int, ...] | None, index: int) -> torch.Tensor:
    """The stored rows of one sequence, as a view."""
    if lens is None:
        return rows[index]
    begin = sum(lens[:index])
    return rows[begin : begin + lens[index]]


def _cumulative_list(lens: tuple[int, ...] | None) -> list[int] | None:
    return None if lens is None else [0, *itertools.accumulate(lens)]


def _cumulative(lens: tuple[int, ...] | None, device: str | torch.device) -> torch.Tensor | None:
    return _int32(_cumulative_list(lens), device)


def _int32(values: tuple[int, ...] | list[int] | None, device: str | torch.device) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)
