"""Variable length: cu_seqlens and seqused on either side, with everything that is not part of a sequence poisoned."""

from __future__ import annotations

import itertools

import torch

from .cases import KERNEL_MASKS, MASKS, Case, each
from .harness import check, make_tensors, run

LENS_Q = (64, 1, 0, 200, 129, 3, 0, 0, 257)
LENS_K = (100, 0, 17, 200, 65, 300, 1, 0, 128)
USED_Q = (64, 1, 0, 100, 128, 1, 0, 0, 0)
USED_K = (99, 0, 1, 0, 64, 257, 1, 0, 128)

HEAD_DIMS = [(40, 40), (64, 64), (96, 96), (128, 128), (192, 192), (248, 248), (256, 256)]
HEAD_DIMS += [(192, 128), (64, 128), (64, 256), (64, 512)]


def _head_dim_grid() -> list[Case]:
    return [
        Case(d, dv, lens_q=LENS_Q, lens_k=LENS_K, spare_q=2, spare_k=130, heads_q=4, heads_kv=heads_kv, **mask.options)
        for ((d, dv), mask), heads_kv in zip(
            itertools.product(HEAD_DIMS, KERNEL_MASKS), itertools.cycle([4, 2, 1]), strict=False
        )
    ]


def _feature_grid() -> list[Case]:
    """W6: seqused x softcap x mask x dtype, crossed instead of one at a time."""
    return [
        Case(
            d,
            0,
            dtype,
            lens_q=LENS_Q,
            lens_k=LENS_K,
            used_q=used_q,
            used_k=used_k,
            softcap=softcap,
            heads_q=6,
            **mask.options,
        )
        for dtype, d, mask, softcap, used_q, used_k in itertools.product(
            (torch.bfloat16, torch.float16), (64, 128), MASKS, (0.0, 15.0), (None, USED_Q), (None, USED_K)
        )
        if dtype == torch.bfloat16 or not softcap
    ]


def _one_sided() -> list[Case]:
    """cu_seqlens on one side only, or none at all beside seqused: through the raw operator."""
    lens, used = (70, 0, 129, 200), (70, 0, 5, 130)
    sides = [
        {"lens_q": lens, "seqlen_k": 150},
        {"lens_k": lens, "seqlen_q": 150},
        {"lens_q": lens, "seqlen_k": 210, "used_k": used},
        {"used_q": used, "seqlen_q": 200, "seqlen_k": 150},
        {"used_k": used, "seqlen_q": 150, "seqlen_k": 200},
        {"used_q": used, "used_k": used[::-1], "seqlen_q": 200, "seqlen_k": 256},
    ]
    return [
        Case(d, batch=4, **side, **mask.options)
        for d, side, mask in itertools.product((64, 128, 256), sides, KERNEL_MASKS)
    ]


@each(_head_dim_grid())
def test_head_dims(case: Case) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(_feature_grid())
def test_seqused_softcap_and_mask(case: Case) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(_one_sided())
def test_one_side_varlen(case: Case) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(
    Case(d, lens_q=tuple(range(1, 260)), lens_k=tuple(range(259, 0, -1)), heads_q=2, heads_kv=1, **mask.options)
    for d in (64, 128)
    for mask in KERNEL_MASKS
)
def test_every_residue_of_the_tiles(case: Case) -> None:
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each(Case(d, lens_q=(5, 700, 33), lens_k=(5, 900, 40), causal=True, spare_q=9) for d in (64, 128))
def test_max_seqlen_may_be_an_upper_bound(case: Case) -> None:
    """Callers round max_seqlen up; the lengths that count are those in cu_seqlens."""
    tensors = make_tensors(case)
    exact = run(case, tensors)
    generous = run(case, tensors, max_seqlen_q=1024, max_seqlen_k=2048)
    check(case, tensors, *generous)
    assert torch.equal(exact[0].nan_to_num(), generous[0].nan_to_num())


@each(
    [Case(128, lens_q=(3000,) * 2 + (1,) * 1100, lens_k=(3000,) * 2 + (7,) * 1100, heads_q=2, heads_kv=1, causal=True)]
)
def test_more_than_a_thousand_sequences_of_unequal_length(case: Case) -> None:
    """I5: more sequences than one scan of a scheduler covers."""
    tensors = make_tensors(case)
    check(case, tensors, *run(case, tensors))


@each([Case(128, lens_q=(100, 50), lens_k=(128, 70), causal=True)])
def test_index_tensors_are_not_read_past_their_end(case: Case) -> None:
    """L6: cu_seqlens and seqused lie in front of garbage."""
    tensors = make_tensors(case.replace(used_q=(90, 50), used_k=(128, 60)))
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        values = getattr(tensors, name)
        guarded = torch.full((values.numel() + 64,), 2_147_480_000, dtype=torch.int32, device=values.device)
        guarded[: values.numel()] = values
        setattr(tensors, name, guarded[: values.numel()])
    case = case.replace(used_q=(90, 50), used_k=(128, 60))
    check(case, tensors, *run(case, tensors))
