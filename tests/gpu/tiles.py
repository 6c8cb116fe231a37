"""`TileCase`: a call by a given tile, whatever the planner's table has; and such calls for all values of tiles' fields.

What the table does not use, no other test runs on a GPU. The tuner would be the first to, with hundreds of kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from flash_attn_3 import compiler
from flash_attn_3.cache import CompiledKernel
from flash_attn_3.config import ForwardConfig
from flash_attn_3.heuristics import ForwardPlan, plan_choice, tile_key
from flash_attn_3.launch import cuda_forward
from flash_attn_3.problem import HOPPER_SMS, ForwardProblem
from flash_attn_3.tile_table import ForwardTile, TileChoice, TileKey, forward_tiles
from flash_attn_3.tune.candidates import along_axes, default_axes, feasible_tiles

from .cases import FEW_SMS, Case
from .harness import Tensors, check, make_tensors
from .sanitizer_subset import on_device

#: Keys and values that are worked on together: so few bytes that even small calls have several sections.
L2_KV_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class TileCase(Case):
    """One forward call, on so few multiprocessors that a CTA has several tiles."""

    tile: ForwardTile = dataclasses.field(kw_only=True)

    def sm_margin(self, num_sms: int = HOPPER_SMS) -> int:
        return max(0, num_sms - FEW_SMS)

    def kernel_config(self) -> ForwardConfig:
        return plan_tile(self.problem(), self.tile).config


def plan_tile(problem: ForwardProblem, tile: ForwardTile) -> ForwardPlan:
    """The launch shape of a problem by a given tile."""
    return plan_choice(problem, TileChoice(None, tile, L2_KV_BYTES))


def prepare(
    case: Case, tensors: Tensors, problem: ForwardProblem, plan: ForwardPlan, kernel: CompiledKernel
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A call that launches the plan's kernel; returns out and lse, which were full of NaN before."""
    launch = cuda_forward(kernel, problem, plan, case.scale, case.softcap)
    rows, device = tensors.q.shape[:-1], tensors.q.device
    index_tensors = tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full((*rows, case.dv), torch.nan, dtype=case.dtype, device=device)
        lse = torch.full((*rows[:-2], rows[-1], rows[-2]), torch.nan, device=device)
        launch(tensors.q, tensors.k, tensors.v, out, lse, *index_tensors, None)
        return out, lse

    return call


def run_tile_case(case: TileCase, device: str = "cuda") -> None:
    """Call and check one case; the reference is computed on the CPU."""
    tensors = make_tensors(case, "cpu")
    problem = case.problem()
    plan = plan_tile(problem, case.tile)
    out, lse = prepare(case, on_device(tensors, device), problem, plan, compiler.get_kernel(plan.config))()
    check(case, tensors, out.cpu(), lse.cpu())


def cases_along_axes(case: Case) -> dict[str, TileCase]:
    """For each value of each axis, "num_stages=3", say, that the table's tile for a call does not have: the call by the
    nearest tile that has it. Without a mask where no tile with a mask does.
    """
    unmasked = case.replace(causal=False, window_size=(-1, -1), attention_chunk=0)
    return {
        name: TileCase(**_fields(call), tile=tile)
        for call in (unmasked, case)
        for name, tile in _tiles_along_axes(tile_key(call.problem())).items()
    }


@functools.cache
def _tiles_along_axes(key: TileKey) -> dict[str, ForwardTile]:
    axes = default_axes()
    steps = along_axes(forward_tiles().choices[key][-1].tile, feasible_tiles(key, axes), axes)
    return {f"{name}={getattr(value, 'slug', value)}": tile for (name, value), tile in steps.items()}


def _fields(case: Case) -> dict[str, Any]:
    return {field.name: getattr(case, field.name) for field in dataclasses.fields(Case)}
