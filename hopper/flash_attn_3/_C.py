"""Importing this module registers `torch.ops.flash_attn_3`, as FlashAttention-3's extension of this name does."""

from . import ops as ops
from . import unavailable_ops as unavailable_ops
