"""`from flash_attn_interface import flash_attn_func`, as programs written for FlashAttention-3 do."""

from flash_attn_3.flash_attn_interface import *  # noqa: F403  (the names are its __all__, private ones included)
from flash_attn_3.flash_attn_interface import __all__ as __all__
