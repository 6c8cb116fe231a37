"""Named sets of kernels to build ahead of time: ``none``, ``core``, ``all``, or a file with one kernel name per line.

Every set is made by asking the planner, so it cannot name a kernel that no call would use.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from .backward_config import Accumulation, BackwardConfig
from .backward_plan import BackwardProblem, backward_head_dim_tiles, plan_backward
from .config import HEAD_DIM_TILES, Dtype, ForwardConfig, KernelConfig, Mask, Score, SeqLayout
from .heuristics import forward_configs, head_dim_tiles
from .problem import HEAD_DIM_STEP, HOPPER_SMS, MAX_HEAD_DIM_V, ForwardProblem, MaskSpec
from .tile_table import HEAD_DIM_PAIRS


def core_configs() -> list[KernelConfig]:
    """The common set: head dims 64 and 128, both dtypes, full and causal, dense and variable length; the gradients of
    all of these, added up in any order."""
    axes = list(itertools.product((64, 128), (Dtype.BF16, Dtype.FP16), (Mask.FULL, Mask.CAUSAL), SeqLayout))
    forward = [
        config
        for head_dim, dtype, mask, layout in axes
        for config in _forward_configs(head_dim, head_dim, dtype, mask, layout, Score.SCALED)
    ]
    backward = [
        _backward_config(head_dim, head_dim, dtype, mask, layout, Score.SCALED, Accumulation.UNORDERED)
        for head_dim, dtype, mask, layout in axes
    ]
    return [*forward, *backward]


@functools.lru_cache(maxsize=1)
def _all_configs() -> tuple[KernelConfig, ...]:
    kinds = (Dtype, Mask, SeqLayout, Score)
    forward = (_forward_configs(*dims, *kind) for dims, *kind in itertools.product(_head_dim_pairs(), *kinds))
    backward_pairs = dict.fromkeys(backward_head_dim_tiles(*dims) for dims in HEAD_DIM_PAIRS)
    backward = (
        _backward_config(*dims, *kind) for dims, *kind in itertools.product(backward_pairs, *kinds, Accumulation)
    )
    return tuple(dict.fromkeys(itertools.chain(*forward, backward)))


def all_configs() -> list[KernelConfig]:
    """Every kernel that the planner can choose."""
    return list(_all_configs())


PRESETS: dict[str, Callable[[], list[KernelConfig]]] = {"none": list, "core": core_configs, "all": all_configs}


def load(selection: str) -> list[KernelConfig]:
    """The configurations of a preset, or of a file with one kernel name per line (blank lines and # comments apart).

    Raises:
        ValueError: neither a preset nor a readable file; or the file names a kernel that does not exist.
    """
    if selection in PRESETS:
        return PRESETS[selection]()
    try:
        lines = Path(selection).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"kernel set {selection!r} is not supported; it must be {', '.join(PRESETS)}, "
            f"or a readable file with one kernel name per line ({error})"
        ) from error
    names = (line.partition("#")[0].strip() for line in lines)
    return resolve(name for name in names if name)


def resolve(names: Iterable[str]) -> list[KernelConfig]:
    """Kernel names -> configurations, in the same order, each once.

    Raises:
        ValueError: a name that no kernel of the planner has, with the closest ones that exist.
    """
    by_name = {config.name: config for config in _all_configs()}
    configs = []
    for name in dict.fromkeys(names):
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no kernel named {name!r}{hint} (generate_kernels.py --list shows all)")
        configs.append(by_name[name])
    return configs


def _head_dim_pairs() -> list[tuple[int, int]]:
    """One (head_dim, head_dim_v) for each pair of tiles that some head dims are served by."""
    pairs: dict[tuple[int, int], None] = {}
    for head_dim in HEAD_DIM_TILES:
        for head_dim_v in range(HEAD_DIM_STEP, MAX_HEAD_DIM_V + 1, HEAD_DIM_STEP):
            try:
                pairs[head_dim_tiles(head_dim, head_dim_v)] = None
            except ValueError:
                break  # no kernel for values this wide, nor for wider ones
    return list(pairs)


def _forward_configs(
    head_dim: int, head_dim_v: int, dtype: Dtype, mask: Mask, layout: SeqLayout, score: Score
) -> list[ForwardConfig]:
    """What the planner answers to sequences of every length; the kernels depend on nothing else."""
    return forward_configs(_problem(head_dim, head_dim_v, dtype, mask, layout, score))


def _backward_config(
    head_dim: int,
    head_dim_v: int,
    dtype: Dtype,
    mask: Mask,
    layout: SeqLayout,
    score: Score,
    accumulation: Accumulation,
) -> BackwardConfig:
    """What the planner of the backward pass answers."""
    problem = _problem(head_dim, head_dim_v, dtype, mask, layout, score)
    return plan_backward(BackwardProblem(problem, accumulation)).config


def _problem(
    head_dim: int, head_dim_v: int, dtype: Dtype, mask: Mask, layout: SeqLayout, score: Score
) -> ForwardProblem:
    return ForwardProblem(
        dtype=dtype,
        batch=1,
        max_seqlen_q=8192,
        max_seqlen_k=8192,
        heads_q=16,
        heads_kv=16,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=MaskSpec(mask),
        score=score,
        seq_layout=layout,
        num_sms=HOPPER_SMS,
    )
