"""A call by a given tile, in the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from emulation import Emulator, SourceChange
from flash_attn_3.config import Dtype, SeqLayout
from flash_attn_3.heuristics import tile_key
from flash_attn_3.tile_table import ForwardTile, TileKey, forward_tiles
from flash_attn_3.tune import launch
from flash_attn_3.tune.serving import served_calls, what_is_wrong
from flash_attn_3.tune.shapes import softcap_of
from tests.gpu.cases import Case
from tests.gpu.harness import Tensors, check
from tests.gpu.tiles import plan_tile, prepare


def audit_tile(
    emulator: Emulator, key: TileKey, tile: ForwardTile, dtype: Dtype, seq_layout: SeqLayout
) -> dict[str, str | None]:
    """What the tuner's audit finds: call -> what is wrong with its results, or None."""
    found = {}
    for call in served_calls(key, dtype, seq_layout, emulator.num_sms, "cpu"):
        plan = plan_tile(call.problem, tile)
        out, lse = call.new_results()
        tensors = (call.q, call.k, call.v, out, lse)
        softcap = softcap_of(key.score)
        launch.prepare(emulator.kernel(plan.config), call.problem, plan, softcap, tensors, call.cu_seqlens)()
        found[call.name] = what_is_wrong(out, lse, call)
    return found


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
