"""A call by a given tile, in the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from emulation import Emulator, SourceChange
from flash_attn_3.heuristics import tile_key
from flash_attn_3.tile_table import forward_tiles
from tests.gpu.cases import Case
from tests.gpu.harness import Tensors, check
from tests.gpu.tiles import plan_tile, prepare


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
    plan = plan_tile(problem, dataclasses.replace(tile, **changes))
    call = prepare(case, tensors, problem, plan, emulator.kernel(plan.config, defect))
    for seed in seeds:
        emulator.seed(seed)
        out, lse = call()
        check(case, tensors, out, lse)
    return out, lse
