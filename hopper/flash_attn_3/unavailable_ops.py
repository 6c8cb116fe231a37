"""The operators of `torch.ops.flash_attn_3` that have a schema and no kernel yet: they raise NotImplementedError.

Programs look for them, and read their schemas, before they know whether they will call them.
"""

from __future__ import annotations

import functools
from typing import NoReturn

from .operators import LIBRARY

_FWD_COMBINE_SCHEMA = """fwd_combine(
    Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, ScalarType? out_dtype=None
) -> (Tensor(out!), Tensor)"""

_GET_SCHEDULER_METADATA_SCHEMA = """get_scheduler_metadata(
    SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads, SymInt num_heads_k, SymInt headdim,
    SymInt headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
    Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, SymInt? page_size=None,
    SymInt max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
    int attention_chunk=0, bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, int sm_margin=0
) -> Tensor"""


def raise_unavailable(name: str, *args, **kwargs) -> NoReturn:
    """In place of a call of what is not there yet."""
    raise NotImplementedError(f"{name} is not available yet")


for _schema in (_FWD_COMBINE_SCHEMA, _GET_SCHEDULER_METADATA_SCHEMA):
    LIBRARY.define(_schema)
    _name = _schema.partition("(")[0]
    # Composite: the same on every device, for fake tensors and with gradients.
    LIBRARY.impl(
        _name, functools.partial(raise_unavailable, f"torch.ops.flash_attn_3.{_name}"), "CompositeImplicitAutograd"
    )
