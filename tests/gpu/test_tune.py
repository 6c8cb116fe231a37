"""The tuner's measuring process on a GPU: it checks and times real kernels."""

import pytest
import torch

from flash_attn_3 import compiler
from flash_attn_3.tile_table import ForwardTile, TileChoice, TileKey, forward_tiles
from flash_attn_3.tune.job import Audit, Job, Variant
from flash_attn_3.tune.process import Measured, Worker
from flash_attn_3.tune.shapes import TuneShape
from flash_attn_3.tune.suspects import Suspects

from .cases import CAUSAL, FULL, Case, each

pytestmark = pytest.mark.hardware


@each([Case(dtype=dtype, causal=True) for dtype in (torch.bfloat16, torch.float16)])
def test_present_kernels_are_fit_for_other_calls(case):
    config = case.kernel_config()
    kernel = compiler.get_kernel(config)
    key = TileKey(config.head_dim, config.head_dim_v, config.mask, config.score)
    entry = (kernel.meta["source_key"], kernel.meta["build_key"])
    choice = TileChoice(None, ForwardTile.of(config), 1)
    variant = Variant(choice, *entry, dtype=config.dtype, seq_layout=config.seq_layout)
    with Worker(timeout=60.0) as worker:
        assert worker.measure(Audit(key, (variant,), str(kernel.folder.parent)), Suspects()) == Measured()


@each(Case(causal=mask.causal) for mask in (FULL, CAUSAL))
def test_present_kernels_are_right_and_timed(case):
    config = case.kernel_config()
    kernel = compiler.get_kernel(config)
    key = TileKey(config.head_dim, config.head_dim_v, config.mask, config.score)
    tile = forward_tiles().choice(key, case.max_seqlen_q).tile
    entry = (kernel.meta["source_key"], kernel.meta["build_key"])
    # The same kernel twice, with sections of different sizes.
    variants = (
        Variant(TileChoice(None, tile, 1), *entry, is_present=True),
        Variant(TileChoice(None, tile, 2**30), *entry),
    )
    shape = TuneShape(key, batch=4, seqlen=500, heads=4)
    job = Job(shape, variants, str(kernel.folder.parent), warm_up=1, turns=(2, 2), drop_behind=10.0)
    with Worker(timeout=60.0) as worker:
        measured = worker.measure(job, Suspects())
    assert measured.failed == {} and measured.abandoned is None
    assert all(len(measured.rounds_ms[v]) == 2 and min(measured.rounds_ms[v]) > 0 for v in variants)
    assert all(0 < measured.errors[v] < 1e-2 for v in variants)
