"""Random calls from a fixed seed. A failure prints the whole `Case`, which repeats it alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from .calls import make_call
from .cases import Case, GradientCase, each
from .harness import make_tensors, run

NUM_CASES = 400
NUM_GRADIENT_CASES = 300


def _random_case(seed: int) -> Case:
    draw = random.Random(seed)
    head_dim, head_dim_v = draw.choice(
        [(8, 8), (64, 64), (64, 64), (72, 72), (128, 128), (128, 128), (192, 128), (256, 256), (64, 256), (64, 512)]
    )
    heads_kv = draw.choice([1, 1, 2, 3])
    shape: dict[str, object] = {
        "heads_q": heads_kv * draw.choice([1, 1, 2, 3, 5, 8]),
        "heads_kv": heads_kv,
        "causal": draw.random() < 0.4,
        "softcap": draw.choice([0.0, 0.0, 0.0, 8.0]) if head_dim in (64, 128) else 0.0,
        "softmax_scale": draw.choice([None, None, 0.05, 0.7]),
    }
    if draw.random() < 0.4:
        shape["window_size"] = (draw.choice([-1, 0, 3, 70, 200]), draw.choice([-1, 0, 9, 64, 300]))
    if draw.random() < 0.2:
        shape["attention_chunk"] = draw.choice([5, 64, 129, 400])
    if draw.random() < 0.5:
        shape |= {"batch": draw.randint(1, 4), "seqlen_q": _length(draw, 1), "seqlen_k": _length(draw, 1)}
        return Case(head_dim, head_dim_v, seed=seed, **shape)
    count = draw.randint(1, 7)
    for side in "qk":
        lens = tuple(_length(draw, 0) for _ in range(count))
        shape |= {f"lens_{side}": lens, f"spare_{side}": draw.choice([0, 0, 1, 64])}
        if draw.random() < 0.4:
            shape[f"used_{side}"] = tuple(draw.randint(0, length) for length in lens)
    return Case(head_dim, head_dim_v, seed=seed, **shape)


def _length(draw: random.Random, least: int) -> int:
    """Mostly near a multiple of 64, where tiles begin and end."""
    if draw.random() < 0.2:
        return draw.randint(least, 3)
    return max(least, draw.randint(0, 10) * 64 + draw.choice([-1, 0, 1, draw.randint(-31, 31)]))


def _random_gradient_case(seed: int) -> GradientCase:
    """A random call with what matters to its gradients, which know no wider values.

    Some row sees two keys: dq and dk of rows that see one are zero but for rounding in fp32, which the rule leaves out.
    """
    draw = random.Random(f"gradients {seed}")
    case = _random_case(seed)
    options = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    options |= {
        "head_dim_v": min(case.dv, 256),
        "seqlen_k": max(case.seqlen_k, 2),
        "window_size": tuple(side or 1 for side in case.window_size),
        "dtype": draw.choice([torch.bfloat16, torch.bfloat16, torch.float16]),
        "softcap": draw.choice([0.0, 0.0, 8.0]),
        "deterministic": draw.random() < 0.5,
        "with_dlse": draw.random() < 0.5,
    }
    return GradientCase(**options)


def _id(case: Case) -> str:
    return f"{'gradients-' if isinstance(case, GradientCase) else ''}seed{case.seed}"


@pytest.mark.parametrize(
    "case",
    [
        *(_random_case(seed) for seed in range(NUM_CASES)),
        *(_random_gradient_case(seed) for seed in range(NUM_GRADIENT_CASES)),
    ],
    ids=_id,
)
def test_random_case(case: Case) -> None:
    call = make_call(case)
    try:
        call.check(call.run())
    except (AssertionError, RuntimeError, ValueError) as error:
        raise AssertionError(f"{case!r}: {error}") from error


@each([Case(128, dtype=torch.float16, seqlen_q=200, seqlen_k=200), Case(128, seqlen_q=200, seqlen_k=200)])
def test_integers_are_exact(case: Case) -> None:
    """Every weight is 1/8: small integer values leave no room for rounding."""
    tensors = make_tensors(case.replace(seqlen_k=8))
    tensors.q.zero_()
    tensors.v = torch.randint(-8, 9, tensors.v.shape, device="cuda").to(case.dtype)
    out, _ = run(case.replace(seqlen_k=8), tensors)
    mean = tensors.v.double().mean(1, keepdim=True).repeat_interleave(case.heads_q // case.heads_kv, dim=2)
    assert torch.equal(out.double(), mean.expand_as(out))
