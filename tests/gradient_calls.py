"""Calls of the CPU back end's backward pass below the public functions, for its tests."""

import dataclasses

import torch

import cpu_calls
from flash_attn_3 import cpu_backend
from flash_attn_3.backward_config import Accumulation
from flash_attn_3.backward_plan import BackwardProblem, padded_rows, plan_backward, round_up
from gradient_reference import Gradients, assert_gradients_close, gradients
from reference import DENSE, FULL, AttentionOptions, Sequences

NAN = float("nan")


def random_gradients(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dout and dlse of standard normal numbers; dlse is (b, h, sq) or (h, total_q), in the accumulation type."""
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn((*q.shape[:-1], v.shape[-1]), generator=generator).to(q.dtype)
    dlse = torch.randn(q.shape[:-1], generator=generator).to(torch.promote_types(q.dtype, torch.float32)).mT
    return dout, dlse


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    options: AttentionOptions = FULL,
    sequences: Sequences = DENSE,
    tile: tuple[int, int] | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    gradient_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Plan and run a forward and a backward pass; everything that they are to write is NaN before.

    tile: (block_m, block_n) in place of the planner's choice.
    gradient_dtype: of the gradients, in place of the inputs' own.
    """
    out, lse = cpu_calls.forward(q, k, v, options, sequences)
    problem = BackwardProblem(cpu_calls.problem_of(q, k, v, options, sequences), Accumulation.UNORDERED)
    batch, seqlen_q = problem.forward.batch, problem.forward.max_seqlen_q
    plan = plan_backward(problem)
    if tile is not None:
        config = dataclasses.replace(plan.config, block_m=tile[0], block_n=tile[1])
        plan = dataclasses.replace(plan, config=config)
    block_m, heads = plan.config.block_m, q.shape[-2]
    if sequences.cu_seqlens_q is None:
        statistics_shape = (2, batch, heads, round_up(seqlen_q, block_m))
    else:
        statistics_shape = (2, heads, padded_rows(q.shape[0], batch, block_m))
    index_tensors = [
        None if field is None else torch.tensor(field, dtype=torch.int32) for field in dataclasses.astuple(sequences)
    ]
    tensors = zip((q, k, v), wanted, strict=True)
    found = [torch.full_like(x, NAN, dtype=gradient_dtype) if is_wanted else None for x, is_wanted in tensors]
    statistics = torch.full(statistics_shape, NAN, dtype=lse.dtype)
    tensors = cpu_backend.BackwardTensors(dout, q, k, v, out, lse, dlse, statistics, *found, *index_tensors)
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    cpu_backend.backward(plan, problem, tensors, scale, options.softcap)
    assert not statistics.isnan().any()
    return tuple(found)


def check(q, k, v, options=FULL, sequences=DENSE, with_dlse=False, **call) -> None:
    """16-bit gradients pass the tolerance rule."""
    dout, dlse = random_gradients(q, v)
    dlse = dlse if with_dlse else None
    actual = backward(q, k, v, dout, dlse, options, sequences, **call)
    assert_gradients_close(actual, q, k, v, dout, dlse, options, sequences)


def check_exactly(q, k, v, options=FULL, sequences=DENSE, with_dlse=True, **call) -> None:
    """float64 gradients are those of plain attention but for rounding in float64, which no wrong formula passes."""
    dout, dlse = random_gradients(q, v)
    dlse = dlse if with_dlse else None
    actual = backward(q, k, v, dout, dlse, options, sequences, **call)
    assert_equal_in_float64(actual, gradients(q, k, v, dout, dlse, options, sequences))


def assert_equal_in_float64(actual: tuple[torch.Tensor, ...], expected: Gradients) -> None:
    for name, found, exact in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
