"""Exact attention for NVIDIA Hopper. The functions are in `flash_attn_3.flash_attn_interface`."""

__version__ = "3.0.0"
