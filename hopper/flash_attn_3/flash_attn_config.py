"""What this build can do, in the words of FlashAttention-3's generated module of this name.

Kernels are compiled when they are needed, so a flag here says that a feature does not exist at all,
never that somebody chose not to build it.
"""

from __future__ import annotations

import pprint

CONFIG: dict[str, dict[str, bool]] = {
    "build_flags": {
        "FLASHATTENTION_DISABLE_BACKWARD": False,
        "FLASHATTENTION_DISABLE_SPLIT": True,
        "FLASHATTENTION_DISABLE_PAGEDKV": True,
        "FLASHATTENTION_DISABLE_APPENDKV": True,
        "FLASHATTENTION_DISABLE_LOCAL": False,
        "FLASHATTENTION_DISABLE_SOFTCAP": False,
        "FLASHATTENTION_DISABLE_PACKGQA": False,
        "FLASHATTENTION_DISABLE_FP16": False,
        "FLASHATTENTION_DISABLE_FP8": True,
        "FLASHATTENTION_DISABLE_VARLEN": False,
        "FLASHATTENTION_DISABLE_CLUSTER": False,
        "FLASHATTENTION_DISABLE_HDIM64": False,
        "FLASHATTENTION_DISABLE_HDIM96": False,
        "FLASHATTENTION_DISABLE_HDIM128": False,
        "FLASHATTENTION_DISABLE_HDIM192": False,
        "FLASHATTENTION_DISABLE_HDIM256": False,
        "FLASHATTENTION_DISABLE_SM8x": True,
        "FLASHATTENTION_ENABLE_VCOLMAJOR": False,
        "FLASH_ATTENTION_DISABLE_HDIMDIFF64": False,
        "FLASH_ATTENTION_DISABLE_HDIMDIFF192": False,
    }
}


def show() -> None:
    """Print `CONFIG`."""
    pprint.pprint(CONFIG)
