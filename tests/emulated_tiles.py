"""A call by a given tile, in the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from emulation import Emulator, SourceChange
from flash_attn_3.heuristics import plan_choice, tile_key
from flash_attn_3.launch import cuda_forward
from flash_attn_3.tile_table import TileChoice, forward_tiles
from tests.gpu.cases import Case
from tests.gpu.harness import Tensors, check


def run_tile(
    emulator: Emulator,
    case: Case,
    tensors: Tensors,
    changes: Mapping[str, Any],
    seeds: Iterable[int],
    defect: SourceChange | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the call and check its results, once for each seed; ``changes`` stand in the place of the table's fields.

    Returns:
        out and lse of the last seed.
    """
    problem = dataclasses.replace(case.problem(), num_sms=emulator.num_sms)
    tile = forward_tiles().choice(tile_key(problem), problem.max_seqlen_q).tile
    plan = plan_choice(problem, TileChoice(None, dataclasses.replace(tile, **changes), 2**20))
    launch = cuda_forward(emulator.kernel(plan.config, defect), problem, plan, case.scale, case.softcap)
    rows = tensors.q.shape[:-1]
    for seed in seeds:
        out = torch.full((*rows, case.dv), torch.nan, dtype=case.dtype)
        lse = torch.full((*rows[:-2], rows[-1], rows[-2]), torch.nan)
        emulator.seed(seed)
        index_tensors = tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k
        launch(tensors.q, tensors.k, tensors.v, out, lse, *index_tensors, None)
        check(case, tensors, out, lse)
    return out, lse
