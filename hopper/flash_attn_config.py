"""`import flash_attn_config`, as programs written for FlashAttention-3 do."""

from flash_attn_3.flash_attn_config import CONFIG, show

__all__ = ["CONFIG", "show"]
