"""`from flash_attn_3.flash_attn_interface import flash_attn_func`: everything that users import, in one place."""

from .backward_ops import _flash_attn_backward, _flash_attn_backward_fake
from .dispatch import maybe_contiguous
from .interface import (
    USE_TRITON_ROCM,
    FlashAttnFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    flash_attn_3_gpu,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    round_multiple,
    round_up_headdim,
)
from .ops import _backward, _flash_attn_forward, _flash_attn_forward_fake, setup_context

__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "_backward",
    "_flash_attn_backward",
    "_flash_attn_backward_fake",
    "_flash_attn_forward",
    "_flash_attn_forward_fake",
    "flash_attn_3_gpu",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
    "round_up_headdim",
    "setup_context",
]
